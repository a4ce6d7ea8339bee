//! What a request gives by itself.

use longhaul_engine::{Generate, Request, SamplingParams};
use longhaul_server::{BatchOptions, Batched, Event, Finish, Serving, Submission};
use longhaul_text::SpecialTokens;

use crate::harness::{demo, endless, next, run, start, submission};

fn batched() -> Batched {
    start(demo(), BatchOptions::default())
}

#[tokio::test]
async fn tokens_are_those_of_generate() {
    let (mut engine, batched) = (demo(), batched());
    let tokenizer = engine.tokenizer().unwrap();
    let prompt = tokenizer.encode("The river runs past", SpecialTokens::AsText).unwrap();
    for (temperature, penalty) in [(0.0, 1.0), (0.9, 1.3)] {
        let sampling =
            SamplingParams { temperature, repetition_penalty: penalty, seed: 5, ..SamplingParams::greedy() };
        let whole =
            engine.generate(&Request { sampling, ..Request::greedy(prompt.clone(), 12) }, &mut ()).unwrap();
        for top in [0, 3] {
            let mut submission = submission(&prompt);
            submission.sampling.params = sampling;
            submission.logprobs = Some(top);
            let record = run(&batched, submission).await;
            let mut drawn = record.ids();
            if record.finish == Some(Finish::EndOfSequence) {
                drawn.pop();
            }
            assert_eq!(drawn, whole.ids);
            for token in &record.tokens {
                assert_eq!(token.top.len(), top as usize);
                // To the bit: clients compare the two to see whether a token was the best one.
                if let Some((_, score)) = token.top.iter().find(|(id, _)| *id == token.id) {
                    assert_eq!(score.to_bits(), token.logprob.to_bits(), "{token:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn rules_are_obeyed() {
    let batched = batched();
    let prompt = [5, 9, 40, 7];
    let free = run(&batched, endless(&prompt, |_| {})).await.ids();
    assert_eq!(free.len(), 12);
    let stop = free[3];
    let stopped = run(&batched, endless(&prompt, |rules| rules.stop_token_ids = vec![stop])).await;
    let first = free.iter().position(|id| *id == stop).unwrap();
    assert_eq!((&stopped.ids()[..], stopped.finish), (&free[..=first], Some(Finish::StopToken(stop))));
    let later = endless(&prompt, |rules| {
        rules.stop_token_ids = vec![stop];
        rules.min_tokens = 8;
    });
    let later = run(&batched, later).await.ids();
    assert!(later.len() >= 9, "{later:?}");
    assert!(!later[..8].contains(&stop));
    let only = run(&batched, endless(&prompt, |rules| rules.allowed_token_ids = vec![17, 33])).await.ids();
    assert!(only.iter().all(|id| [17, 33].contains(id)), "{only:?}");
    let biased = run(&batched, endless(&prompt, |rules| rules.logit_bias = vec![(21, 1000.0)])).await.ids();
    assert_eq!(biased, [21; 12]);
    let words = vec![vec![free[0], free[1]], vec![free[4]]];
    let clean = run(&batched, endless(&prompt, |rules| rules.bad_words = words)).await.ids();
    assert_eq!(clean.len(), 12);
    assert!(
        !clean.contains(&free[4]) && !clean.windows(2).any(|pair| pair == [free[0], free[1]]),
        "{clean:?}"
    );
    // A client that leaves takes nothing from those that come after it.
    let mut leaving = batched.submit(endless(&prompt, |_| {})).unwrap();
    assert!(matches!(next(&mut leaving).await, Some(Event::Started { .. })));
    drop(leaving);
    assert_eq!(run(&batched, endless(&prompt, |_| {})).await.ids(), free);
}

#[tokio::test]
async fn prompt_scores_are_the_logits_whatever_the_chunks() {
    let (mut engine, batched) = (demo(), batched());
    let prompt: Vec<u32> = (0..75).map(|i| (i * 37) % 500).collect();
    let vocab = engine.spec().vocab_size;
    let mut rows: Vec<Vec<f32>> = Vec::new();
    engine
        .logits(&prompt, None, &mut |logits| {
            rows.extend(logits.chunks_exact(vocab).map(<[f32]>::to_vec));
            Ok(())
        })
        .unwrap();
    for max_tokens in [0, 3] {
        let scored = Submission { max_tokens, prompt_logprobs: Some(2), ..endless(&prompt, |_| {}) };
        let record = run(&batched, scored).await;
        assert_eq!((record.tokens.len(), record.finish), (max_tokens, Some(Finish::Length)));
        assert_eq!(record.prompt.len(), prompt.len());
        assert_eq!(record.prompt[0], None);
        for (at, token) in record.prompt.iter().enumerate().skip(1) {
            let token = token.as_ref().unwrap();
            let row: Vec<f64> = rows[at - 1].iter().map(|l| f64::from(*l)).collect();
            let z = row.iter().map(|l| l.exp()).sum::<f64>().ln();
            assert_eq!(token.id, prompt[at]);
            assert!((f64::from(token.logprob) - (row[prompt[at] as usize] - z)).abs() < 1e-4);
            let best = row.iter().copied().fold(f64::MIN, f64::max);
            assert!((f64::from(token.top[0].1) - (best - z)).abs() < 1e-4);
            assert!(token.top[0].1 >= token.top[1].1);
        }
    }
    // There is nothing to compute of one token.
    for max_tokens in [0, 1] {
        let one = Submission { max_tokens, prompt_logprobs: Some(2), ..endless(&[5], |_| {}) };
        let record = run(&batched, one).await;
        assert_eq!((record.prompt, record.tokens.len()), (vec![None], max_tokens));
        assert_eq!(record.finish, Some(Finish::Length));
    }
}
