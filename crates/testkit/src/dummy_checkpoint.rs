//! Checkpoints of any size, written as a stream.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, json};

use crate::TinyConfig;
use crate::safetensors_file::{dtype_name, join};

/// Writes config.json and model.safetensors of `config` to `dir`, with an arbitrary pattern for values and a fixed amount
/// of memory. Returns the bytes of all tensors.
///
/// # Panics
/// When a file cannot be written.
pub fn write_dummy_checkpoint(dir: &Path, config: &TinyConfig) -> u64 {
    std::fs::write(dir.join("config.json"), config.to_json().to_string()).expect("config.json");
    let mut header = Map::new();
    let mut total = 0u64;
    for (name, shape) in config.tensors() {
        let begin = total;
        total += (shape.iter().product::<usize>() * config.dtype.size()) as u64;
        header.insert(
            name,
            json!({"dtype": dtype_name(config.dtype), "shape": shape, "data_offsets": [begin, total]}),
        );
    }
    let path = dir.join("model.safetensors");
    let mut file = BufWriter::new(File::create(&path).expect("model.safetensors"));
    file.write_all(&join(&header, &[])).expect("model.safetensors");
    // Neither zero pages nor pages that are all alike.
    let pattern: Vec<u8> =
        (0..(1u32 << 20) + 7).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut left = total as usize;
    while left > 0 {
        let part = left.min(pattern.len());
        file.write_all(&pattern[..part]).expect("model.safetensors");
        left -= part;
    }
    file.flush().expect("model.safetensors");
    total
}
