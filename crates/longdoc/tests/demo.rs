//! The embedded demo checkpoint reads documents and finds needles, far beyond its trained window of 768 tokens with Dual
//! Chunk Attention, and not without it.

use longhaul_engine::{EngineError, Generate, Loader, LongContext, ModelRef};
use longhaul_longdoc::needle::{NeedleConfig, NeedleReport, run};
use longhaul_longdoc::{AskOptions, Document, ask};

const HAYSTACK: &str = include_str!("../../../assets/haystack.txt");

fn open(mode: LongContext) -> Result<Box<dyn Generate>, EngineError> {
    let loader =
        Loader { long_context: Some(mode), max_model_len: Some(16_384), ..Loader::new(ModelRef::Demo) };
    Ok(Box::new(loader.load(&mut |_, _| {})?))
}

fn needle(lengths: &[usize], depths: &[f32], modes: &[LongContext]) -> NeedleReport {
    let config = NeedleConfig {
        model: "demo".into(),
        lengths: lengths.to_vec(),
        depths: depths.to_vec(),
        modes: modes.to_vec(),
        haystack: HAYSTACK.into(),
        control: lengths.len() == 1,
        ..NeedleConfig::default()
    };
    run(&config, None, &mut open, &mut ()).unwrap()
}

#[test]
fn answers_from_a_document_and_shows_the_passage() {
    let mut model = open(LongContext::Dca).unwrap();
    let paragraphs: Vec<&str> = HAYSTACK.split("\n\n").take(60).collect();
    let (before, after) = paragraphs.split_at(30);
    let text = format!("{}\n\nThe secret code of Oslo is 48213. {}", before.join("\n\n"), after.join("\n\n"));
    let documents = [Document::from_bytes("novel.txt", text.as_bytes()).unwrap()];
    let answer =
        ask(model.as_mut(), &documents, "What is the secret code of Oslo?", &AskOptions::default(), &mut ())
            .unwrap();
    assert_eq!(answer.answer, "The secret code of Oslo is 48213.");
    assert!(answer.prompt_tokens > 2 * 768);
    let passage = answer.passage.unwrap();
    assert_eq!(passage.text, "The secret code of Oslo is 48213.");
    assert_eq!(&documents[0].text[passage.start..passage.end], passage.text);
}

#[test]
fn dual_chunk_attention_finds_needles_beyond_the_trained_window() {
    let report = needle(&[3072], &[5.0, 35.0, 65.0, 95.0], &[LongContext::None, LongContext::Dca]);
    let [none, dca] = &report.totals[..] else { panic!("two modes") };
    assert_eq!((dca.score.found, dca.score.total), (4, 4), "{:#?}", report.cells);
    assert!(none.score.found < 3, "{:#?}", report.cells);
    assert!(report.totals.iter().all(|t| t.control.is_some_and(|c| c.found == 0 && c.total == 4)));
}

/// A full map to look at: `LONGDOC_SAMPLES=DIR cargo test -p longhaul-longdoc --test demo -- --ignored`.
#[test]
#[ignore = "takes minutes"]
fn full_map() {
    let dir = std::path::PathBuf::from(std::env::var_os("LONGDOC_SAMPLES").unwrap());
    let depths: Vec<f32> = (0..=10u8).map(|d| f32::from(d) * 10.0).collect();
    let report = needle(&[512, 768, 1536, 3072], &depths, &[LongContext::None, LongContext::Dca]);
    report.write(&dir.join("full")).unwrap();
    print!("{}", longhaul_longdoc::render::terminal(&report, Default::default()));
}
