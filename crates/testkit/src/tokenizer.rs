//! A byte-level BPE tokenizer of 256 byte tokens and the three control tokens of the family, with the real
//! pre-tokenizer pattern and chat template.
//!
//! The id of a byte is its value, which makes expected ids in tests readable: `b"Hi"` is `[72, 105]`.

use serde_json::{Map, Value, json};

/// Id of `<|endoftext|>`.
pub const ENDOFTEXT: u32 = 256;
/// Id of `<|im_start|>`.
pub const IM_START: u32 = 257;
/// Id of `<|im_end|>`.
pub const IM_END: u32 = 258;

/// The control tokens in id order.
const SPECIALS: [(&str, u32); 3] =
    [("<|endoftext|>", ENDOFTEXT), ("<|im_start|>", IM_START), ("<|im_end|>", IM_END)];

/// The chat template of the published Qwen2 models.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' \
    %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + \
    message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt \
    %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The pre-tokenizer pattern of the published models.
const PATTERN: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\
    \\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// The printable character that byte-level BPE writes for a byte: itself where it is printable and no space, otherwise
/// the next free one from U+0100 (Radford et al. 2019).
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + rank).expect("below the surrogates")
}

/// The content of tokenizer.json.
pub fn tokenizer_json() -> Value {
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let vocab: Map<String, Value> = (0..=255u8).map(|b| (byte_char(b).to_string(), json!(b))).collect();
    let added: Vec<Value> = SPECIALS.iter().map(|(content, id)| added_token(content, Some(*id))).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": false},
            byte_level,
        ]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    })
}

/// The content of tokenizer_config.json, with the chat template.
pub fn tokenizer_config_json() -> Value {
    let decoder: Map<String, Value> =
        SPECIALS.iter().map(|(content, id)| (id.to_string(), added_token(content, None))).collect();
    json!({
        "add_prefix_space": false,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": null,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": false,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null,
    })
}

/// A control token as both files describe it.
fn added_token(content: &str, id: Option<u32>) -> Value {
    let mut token = json!({
        "content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true,
    });
    if let Some(id) = id {
        token["id"] = json!(id);
    }
    token
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_tokenizer_reads_it_and_ids_are_bytes() {
        let text = tokenizer_json().to_string();
        let tokenizer: tokenizers::Tokenizer = text.parse().unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), 259);
        let prompt = "<|im_start|>user\n안녕, world! 42\t\u{0}\u{7f}<|im_end|>";
        let encoding = tokenizer.encode(prompt, false).unwrap();
        let inner = &prompt["<|im_start|>".len()..prompt.len() - "<|im_end|>".len()];
        let mut expected = vec![IM_START];
        expected.extend(inner.bytes().map(u32::from));
        expected.push(IM_END);
        assert_eq!(encoding.get_ids(), expected);
        assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), prompt);
        assert_eq!(tokenizer.token_to_id("<|endoftext|>"), Some(ENDOFTEXT));
    }

    #[test]
    fn the_template_renders_as_published() {
        let config = tokenizer_config_json();
        let mut environment = minijinja::Environment::new();
        environment.add_template("chat", config["chat_template"].as_str().unwrap()).unwrap();
        let context = json!({"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": true});
        let text =
            environment.get_template("chat").unwrap().render(minijinja::value::Serde(context)).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
             <|im_start|>assistant\n"
        );
    }
}
