//! The tokenizer against the reference implementation, and its files against damage.

use std::path::Path;
use std::sync::OnceLock;

use longhaul_text::{Detokenizer, SpecialTokens, TextError, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

fn demo_path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo/tokenizer.json")
}

fn demo_json() -> &'static Value {
    static ONCE: OnceLock<Value> = OnceLock::new();
    ONCE.get_or_init(|| serde_json::from_slice(&std::fs::read(demo_path()).unwrap()).unwrap())
}

fn demo() -> &'static Tokenizer {
    static ONCE: OnceLock<Tokenizer> = OnceLock::new();
    ONCE.get_or_init(|| Tokenizer::from_file(&demo_path()).unwrap())
}

/// The whole of the reference implementation, reading the same file.
fn reference() -> &'static tokenizers::Tokenizer {
    static ONCE: OnceLock<tokenizers::Tokenizer> = OnceLock::new();
    ONCE.get_or_init(|| tokenizers::Tokenizer::from_file(demo_path()).unwrap())
}

fn reference_ids(text: &str) -> Vec<u32> {
    reference().encode(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn special_tokens_are_known_by_name_and_id() {
    let t = demo();
    assert_eq!(t.vocab_size(), 1503);
    assert_eq!(t.special_id("<|im_start|>"), Some(1501));
    assert_eq!(t.special_id("<|im_end"), None);
    assert!(t.is_special(1502) && !t.is_special(1499) && !t.is_special(u32::MAX));
    assert_eq!(&*t.token_bytes(1502), b"<|im_end|>");
    assert_eq!(&*t.token_bytes(1503), b"");
    assert_eq!(&*t.token_bytes(u32::MAX), b"");
}

#[test]
fn special_strings_in_text_are_text_unless_parsed() {
    let t = demo();
    let text = "a<|im_start|>b<|im_end|>";
    let ids = t.encode(text, SpecialTokens::AsText).unwrap();
    assert!(ids.iter().all(|&id| !t.is_special(id)), "{ids:?}");
    assert_eq!(t.decode(&ids, true), text);
    let parsed = t.encode(text, SpecialTokens::Parse).unwrap();
    assert_eq!(parsed, reference_ids(text));
    let specials: Vec<u32> = parsed.iter().copied().filter(|&id| t.is_special(id)).collect();
    assert_eq!(specials, [1501, 1502]);
    assert_eq!(t.decode(&parsed, false), text);
    assert_eq!(t.decode(&parsed, true), "ab");
}

#[test]
fn every_byte_has_a_token() {
    let t = demo();
    for byte in 0..=u8::MAX {
        let count = (0..t.vocab_size() as u32).filter(|&id| *t.token_bytes(id) == [byte]).count();
        assert_eq!(count, 1, "byte {byte:#04x}");
    }
}

#[test]
fn text_is_normalized_to_nfc_and_offsets_point_into_the_original() {
    let t = demo();
    let decomposed = "cafe\u{301} x";
    let (ids, ranges) = t.encode_with_offsets(decomposed).unwrap();
    assert_eq!(t.decode(&ids, false), "caf\u{e9} x");
    assert_eq!(ids, t.encode(decomposed, SpecialTokens::AsText).unwrap());
    assert_eq!(ranges.len(), ids.len());
    assert_eq!((ranges[0].start, ranges.last().unwrap().end), (0, decomposed.len()));
    // The token of the composed character covers both characters it was made of.
    assert!(
        ranges.iter().any(|range| range.contains(&3) && range.contains(&4) && range.contains(&5)),
        "{ranges:?}"
    );
    for range in &ranges {
        assert!(decomposed.get(range.clone()).is_some(), "{range:?} is not at characters");
    }
}

#[test]
fn ids_outside_the_vocabulary_decode_to_nothing() {
    assert_eq!(demo().decode(&[1503, 151_935, u32::MAX], false), "");
    let mut stream = Detokenizer::new(demo().clone(), false);
    assert_eq!(stream.push(1_000_000), "");
}

#[test]
fn a_detokenizer_starts_over_after_finish() {
    let t = demo();
    let lead = (0..1500).find(|&id| *t.token_bytes(id) == [0xE5]).unwrap();
    let mut stream = Detokenizer::new(t.clone(), true);
    assert_eq!(stream.push(lead), "");
    assert_eq!(stream.push(1502), "", "a special token that is skipped does not end the character");
    assert_eq!(stream.finish(), "\u{FFFD}");
    assert_eq!((stream.finish(), stream.push(0)), (String::new(), "!".to_owned()));
}

fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        any::<String>(),
        "[a-zA-Z0-9 .,;'\n\t-]{0,30}",
        prop::sample::select(vec![
            "<|im_end|>",
            "<|im_start|>",
            "<|endoftext|>",
            "<|",
            "  \n\n ",
            "I'll they'RE",
            "地面にある",
            "🦀🇰🇷",
            "e\u{301}",
            "\u{FB01}\u{212B}",
            "١٢٣",
            "\r\n",
            "\0",
            "한국어",
            "\u{1100}\u{1161}",
        ])
        .prop_map(str::to_owned),
    ];
    prop::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
}

/// Ids with a bias to tokens that are not characters by themselves.
fn ids() -> impl Strategy<Value = Vec<u32>> {
    let broken: Vec<u32> =
        (0..1500).filter(|&id| std::str::from_utf8(&demo().token_bytes(id)).is_err()).collect();
    assert!(broken.len() > 100);
    prop::collection::vec(prop_oneof![0_u32..1510, prop::sample::select(broken)], 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn encoding_equals_the_reference(text in text()) {
        prop_assert_eq!(demo().encode(&text, SpecialTokens::Parse).unwrap(), reference_ids(&text));
    }

    #[test]
    fn text_encodes_without_special_tokens_and_round_trips(text in text()) {
        let ids = demo().encode(&text, SpecialTokens::AsText).unwrap();
        prop_assert!(ids.iter().all(|&id| !demo().is_special(id)));
        // What comes back is the NFC form; the reference's own normalizer says which that is.
        let mut normal = tokenizers::NormalizedString::from(text.as_str());
        tokenizers::Normalizer::normalize(&tokenizers::normalizers::NFC, &mut normal).unwrap();
        prop_assert_eq!(demo().decode(&ids, false), normal.get());
    }

    #[test]
    fn offsets_cover_the_text_in_order(text in text()) {
        let (ids, ranges) = demo().encode_with_offsets(&text).unwrap();
        prop_assert_eq!(&ids, &demo().encode(&text, SpecialTokens::AsText).unwrap());
        let mut covered = 0;
        for range in &ranges {
            prop_assert!(text.get(range.clone()).is_some());
            prop_assert!(range.start <= covered && range.end >= covered, "{:?} after {}", range, covered);
            prop_assert!(!range.is_empty());
            covered = range.end;
        }
        prop_assert_eq!(covered, text.len());
    }

    #[test]
    fn decoding_equals_the_reference_and_the_stream(ids in ids(), skip in any::<bool>()) {
        let whole = demo().decode(&ids, skip);
        prop_assert_eq!(&whole, &reference().decode(&ids, skip).unwrap());
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|&&id| !(skip && demo().is_special(id)))
            .flat_map(|&id| demo().token_bytes(id).into_owned())
            .collect();
        prop_assert_eq!(&whole, &String::from_utf8_lossy(&bytes));
        let mut stream = Detokenizer::new(demo().clone(), skip);
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        pieces.push(stream.finish());
        prop_assert_eq!(pieces.concat(), whole);
    }
}

/// The demo's file with one change.
fn changed(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut json = demo_json().clone();
    change(&mut json);
    serde_json::to_vec(&json).unwrap()
}

fn refusal(bytes: &[u8]) -> String {
    let error = Tokenizer::from_bytes(bytes, "dir/tokenizer.json").unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with("dir/tokenizer.json: "), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    message
}

#[test]
fn files_that_are_not_json_are_refused() {
    let whole = std::fs::read(demo_path()).unwrap();
    for cut in [0, 1, 100, whole.len() / 2, whole.len() - 2] {
        assert!(refusal(&whole[..cut]).contains("not valid JSON"), "cut at {cut}");
    }
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] = 0xFF;
    refusal(&flipped);
    assert!(refusal(b"version https://git-lfs.github.com/spec/v1\n").contains("not valid JSON"));
    assert!(refusal(&[b"[".repeat(200), b"]".repeat(200)].concat()).contains("dir/tokenizer.json: "));
    let error = Tokenizer::from_file(Path::new("/nonexistent/tokenizer.json")).unwrap_err();
    assert!(matches!(error, TextError::Read { .. }));
    assert!(error.to_string().starts_with("cannot read /nonexistent/tokenizer.json: "), "{error}");
}

#[test]
fn malformed_fields_are_refused_by_name() {
    type Change = Box<dyn FnOnce(&mut Value)>;
    let set = |pointer: &'static str, value: Value| -> Change {
        Box::new(move |json| *json.pointer_mut(pointer).unwrap() = value)
    };
    let remove = |object: &'static str, key: &'static str| -> Change {
        Box::new(move |json| drop(json.pointer_mut(object).unwrap().as_object_mut().unwrap().remove(key)))
    };
    let vocab = |token: &'static str, id: Value| -> Change {
        Box::new(move |json| {
            drop(json["model"]["vocab"].as_object_mut().unwrap().insert(token.to_owned(), id))
        })
    };
    let merge = |merge: Value| -> Change { Box::new(move |json| json["model"]["merges"][3] = merge) };
    let whole = |value: Value| -> Change { Box::new(move |json| *json = value) };
    let cases: Vec<(Change, &str)> = vec![
        (whole(json!([1, 2])), "a tokenizer.json object"),
        (whole(json!("text")), "a tokenizer.json object"),
        (whole(json!({})), "model: found nothing"),
        (remove("", "model"), "model: found nothing"),
        (set("/model", json!("bpe")), "`model` as an object"),
        (set("/model/type", json!("Unigram")), "model.type: found the string \"Unigram\", expected \"BPE\""),
        (set("/model/type", json!(7)), "model.type: found 7"),
        (remove("/model", "vocab"), "model.vocab: found nothing"),
        (remove("/model", "merges"), "model.merges: found nothing"),
        (set("/model/vocab", json!([])), "`model.vocab` as an object"),
        (set("/model/vocab", json!({})), "model.vocab: found no token \"Ā\" for byte 0x00"),
        (remove("/model/vocab", "Ġ"), "model.vocab: found no token \"Ġ\" for byte 0x20"),
        (vocab("zzz", json!(-1)), "`model.vocab` ids as integers from 0"),
        (vocab("zzz", json!("5")), "`model.vocab` ids as integers"),
        (vocab("zzz", json!(1.5)), "`model.vocab` ids as integers"),
        (vocab("zzz", json!(5_000_000_000_u64)), "`model.vocab` ids as integers"),
        (vocab("zzz", json!(4_294_967_295_u64)), "model.vocab[\"zzz\"]: found 4294967295"),
        (vocab("zzz", json!(7)), "has it already"),
        (set("/model/merges", json!({})), "`model.merges` as a list"),
        (merge(json!("one-part")), "\"left right\""),
        (merge(json!("a b c")), "\"left right\""),
        (merge(json!(["a"])), "a merge of `model.merges`"),
        (merge(json!(["a", "b", "c"])), "a merge of `model.merges`"),
        (merge(json!(["a", 1])), "invalid type: integer `1`"),
        (merge(json!(12)), "a merge of `model.merges`"),
        (
            merge(json!(["a", "ÐÐÐ"])),
            "model.merges[3]: found \"a\" + \"ÐÐÐ\", expected tokens of model.vocab",
        ),
        (merge(json!("€ b")), "model.merges[3]: found \"€\" + \"b\""),
        (merge(json!(["q", "Q"])), "\"qQ\" is not there"),
        (set("/model/dropout", json!(0.1)), "model.dropout: found 0.1"),
        (
            set("/model/continuing_subword_prefix", json!("##")),
            "model.continuing_subword_prefix: found the string \"##\"",
        ),
        (set("/model/end_of_word_suffix", json!("</w>")), "model.end_of_word_suffix"),
        (set("/model/byte_fallback", json!(true)), "model.byte_fallback: found true"),
        (set("/model/ignore_merges", json!("yes")), "model.ignore_merges: found the string \"yes\""),
        (set("/added_tokens", json!({})), "added_tokens: found an object"),
        (set("/added_tokens/1", json!("x")), "added_tokens[1]: found the string \"x\""),
        (set("/added_tokens/1/id", json!(-3)), "added_tokens[1].id: found -3"),
        (set("/added_tokens/1/id", json!("1501")), "added_tokens[1].id: found the string \"1501\""),
        (
            set("/added_tokens/1/id", json!(1500)),
            "added_tokens[1].id: found 1500, expected an id of its own: added_tokens[0]",
        ),
        (
            set("/added_tokens/1/id", json!(10)),
            "added_tokens[1].id: found 10, expected an id of its own: \"+\"",
        ),
        (
            set("/added_tokens/1/id", json!(1600)),
            "added_tokens[1].id: found 1600 for \"<|im_start|>\", expected 1501",
        ),
        (set("/added_tokens/1/content", json!("")), "added_tokens[1].content: found the string \"\""),
        (set("/added_tokens/1/content", json!(null)), "added_tokens[1].content: found null"),
        (
            set("/added_tokens/1/content", json!("<|endoftext|>")),
            "added_tokens[1].content: found \"<|endoftext|>\"",
        ),
        (set("/added_tokens/1/content", json!("!")), "added_tokens[1].id: found 1501, expected 0"),
        (set("/added_tokens/1/special", json!("yes")), "added_tokens[1].special: found the string \"yes\""),
        (
            Box::new(|json| json["added_tokens"][0] = json!({"id": 0, "content": "!", "special": true})),
            "expected a special token that ordinary text cannot be merged into",
        ),
        (
            set("/normalizer", json!({"type": "Lowercase"})),
            "normalizer: found an object of type \"Lowercase\"",
        ),
        (set("/normalizer", json!("NFC")), "normalizer: found the string \"NFC\""),
        (set("/pre_tokenizer", json!(null)), "pre_tokenizer: found null"),
        (
            set("/pre_tokenizer", json!({"type": "Metaspace"})),
            "pre_tokenizer: found an object of type \"Metaspace\"",
        ),
        (set("/pre_tokenizer/pretokenizers", json!([])), "pre_tokenizer.pretokenizers: found an empty list"),
        (set("/pre_tokenizer/pretokenizers", json!(1)), "pre_tokenizer.pretokenizers: found 1"),
        (
            set("/pre_tokenizer/pretokenizers/1", json!({"type": "Whitespace"})),
            "pre_tokenizer.pretokenizers[1]",
        ),
        (set("/pre_tokenizer/pretokenizers/0/pattern", json!({"Regex": "("})), "pre_tokenizer: "),
        (set("/pre_tokenizer/pretokenizers/0/pattern", json!(3)), "pre_tokenizer: "),
        (set("/decoder", json!({"type": "WordPiece"})), "decoder: found an object of type \"WordPiece\""),
        (set("/decoder", json!(null)), "decoder: found null"),
        (
            set(
                "/post_processor",
                json!({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}),
            ),
            "post_processor: found an object of type \"TemplateProcessing\", expected null or ByteLevel",
        ),
    ];
    assert!(cases.len() >= 50);
    for (change, culprit) in cases {
        let message = refusal(&changed(change));
        assert!(message.contains(culprit), "expected {culprit:?} in {message:?}");
    }
    let twice = String::from_utf8(changed(|_| {})).unwrap().replacen("\"!\":0", "\"!\":0,\"!\":0", 1);
    assert!(refusal(twice.as_bytes()).contains("model.vocab[\"!\"]: found the token twice"));
}

#[test]
fn both_published_forms_of_merges_are_read() {
    let joined = changed(|json| {
        for merge in json["model"]["merges"].as_array_mut().unwrap() {
            *merge = json!(format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()));
        }
    });
    let joined = Tokenizer::from_bytes(&joined, "joined").unwrap();
    let text = "The quick brown fox, 1234 and   more.\n";
    assert_eq!(joined.encode(text, SpecialTokens::AsText).unwrap(), reference_ids(text));
}

#[test]
fn added_tokens_that_are_not_special_match_in_text() {
    let bytes = changed(|json| {
        json["added_tokens"]
            .as_array_mut()
            .unwrap()
            .push(json!({"id": 1503, "content": "<tool_call>", "special": false}));
    });
    let t = Tokenizer::from_bytes(&bytes, "qwen2.5").unwrap();
    let ids = t.encode("<tool_call><|im_end|>", SpecialTokens::AsText).unwrap();
    assert_eq!(ids[0], 1503);
    assert!(!t.is_special(1503) && ids[1..].iter().all(|&id| !t.is_special(id)));
    assert_eq!(t.decode(&ids, true), "<tool_call><|im_end|>");
}

#[test]
fn a_split_pattern_that_explodes_loses_nothing_and_ends() {
    let bytes = changed(|json| {
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"] = json!({"Regex": "(?=(a+)+$)(a+)+\\1b"});
    });
    let t = Tokenizer::from_bytes(&bytes, "dir/tokenizer.json").unwrap();
    let text = "a".repeat(5000);
    // Where the pattern takes too many steps, the library leaves the rest of the text in one piece.
    assert_eq!(t.decode(&t.encode(&text, SpecialTokens::AsText).unwrap(), false), text);
}

#[test]
fn long_monotonous_text_is_encoded() {
    let t = demo();
    for unit in ["^", "A", " ", "\n", "1", "地", "\u{301}", "'", "<|im_"] {
        let text = unit.repeat(20_000);
        let ids = t.encode(&text, SpecialTokens::AsText).unwrap();
        assert_eq!(t.decode(&ids, false), text, "{unit:?}");
    }
}

/// Runs only with a Qwen2 `tokenizer.json`, which is too large to keep here. With `cases.inp` and `cases.out` beside
/// it (llama.cpp's `ggml-vocab-qwen2.gguf.inp` and `.out`), those are checked too.
#[test]
fn qwen2_vocabulary() {
    let Some(path) = std::env::var_os("LONGHAUL_QWEN2_TOKENIZER") else {
        println!("skipped: LONGHAUL_QWEN2_TOKENIZER does not name a tokenizer.json");
        return;
    };
    let path = Path::new(&path);
    let t = Tokenizer::from_file(path).unwrap();
    assert_eq!(t.vocab_size(), 151_646);
    let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let template = longhaul_text::ChatTemplate::new(source, None, Some("<|im_end|>"), "qwen2").unwrap();
    let ids = template.encode(&t, &[longhaul_text::Message::new("user", "Hi")], true).unwrap();
    assert_eq!(
        ids[..14],
        [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
    );
    assert_eq!(ids[ids.len() - 3..], [151644, 77091, 198]);

    let Ok(inputs) = std::fs::read_to_string(path.with_file_name("cases.inp")) else {
        println!("skipped: no cases.inp beside the tokenizer");
        return;
    };
    let outputs = std::fs::read_to_string(path.with_file_name("cases.out")).unwrap();
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let outputs: Vec<&str> = outputs.split('\n').collect();
    let mut checked = 0;
    for (input, output) in inputs.iter().zip(outputs) {
        let expected: Vec<u32> = output.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(t.encode(input, SpecialTokens::AsText).unwrap(), expected, "{input:?}");
        checked += 1;
    }
    assert!(checked >= 40, "{checked} cases");
}
