//! The demo checkpoint, part of the binary: a 1M-parameter Qwen2 that finds a planted code (`demo/README.md`).

pub(crate) const CONFIG: &[u8] = include_bytes!("../../../assets/demo/config.json");
pub(crate) const GENERATION_CONFIG: &[u8] = include_bytes!("../../../assets/demo/generation_config.json");
pub(crate) const TOKENIZER: &[u8] = include_bytes!("../../../assets/demo/tokenizer.json");
pub(crate) const TOKENIZER_CONFIG: &[u8] = include_bytes!("../../../assets/demo/tokenizer_config.json");
pub(crate) const WEIGHTS: &[u8] = include_bytes!("../../../assets/demo/model.safetensors");
