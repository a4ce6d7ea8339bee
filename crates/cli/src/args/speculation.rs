use longhaul_server::NgramConfig;
use serde::Deserialize;

/// Sizes of the n-grams that are looked up when nothing is said, as in vLLM.
const LOOKUP: usize = 5;

/// `--speculative-config`, with the names of vLLM.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpeculativeConfig {
    method: String,
    num_speculative_tokens: usize,
    prompt_lookup_max: Option<usize>,
    prompt_lookup_min: Option<usize>,
}

/// Parses `--speculative-config`.
///
/// # Errors
/// What is wrong, with the field.
pub fn speculation(text: &str) -> Result<NgramConfig, String> {
    let config: SpeculativeConfig = serde_json::from_str(text).map_err(|e| e.to_string())?;
    if config.method != "ngram" {
        return Err(format!("method {:?} is not there; the one method is \"ngram\"", config.method));
    }
    let (max, min) = (config.prompt_lookup_max, config.prompt_lookup_min);
    let config = NgramConfig {
        num_speculative_tokens: config.num_speculative_tokens,
        prompt_lookup_max: max.or(min).unwrap_or(LOOKUP),
        prompt_lookup_min: min.or(max).unwrap_or(LOOKUP),
    };
    config.check().map_err(|e| format!("{} {}", e.field, e.message))?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_as_in_vllm() {
        let sizes = |text: &str| {
            let config = speculation(text).unwrap();
            (config.num_speculative_tokens, config.prompt_lookup_max, config.prompt_lookup_min)
        };
        assert_eq!(sizes(r#"{"method": "ngram", "num_speculative_tokens": 4}"#), (4, 5, 5));
        let max = r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}"#;
        assert_eq!(sizes(max), (4, 3, 3));
        let both = r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}"#;
        assert_eq!(sizes(both), (4, 4, 2));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("{", "EOF"),
            (r#"{"method": "ngram"}"#, "num_speculative_tokens"),
            (r#"{"method": "eagle", "num_speculative_tokens": 4}"#, "\"eagle\" is not there"),
            (r#"{"method": "ngram", "num_speculative_tokens": 4, "model": "x"}"#, "model"),
            (r#"{"method": "ngram", "num_speculative_tokens": 40}"#, "num_speculative_tokens is 40"),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 1, "prompt_lookup_min": 2}"#,
                "prompt_lookup_max is 1",
            ),
        ];
        for (text, expected) in cases {
            let error = speculation(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
