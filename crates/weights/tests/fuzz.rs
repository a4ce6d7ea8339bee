//! Random damage to a valid file: opening never panics, and when it succeeds the tensors are still the expected ones.

mod common;

use std::sync::LazyLock;

use common::{OPTIONAL, open, specs};
use longhaul_testkit::{TinyCheckpoint, TinyConfig};
use longhaul_weights::{Checkpoint, Slice, TensorSource};
use proptest::prelude::*;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A change to one place of a file.
#[derive(Debug, Clone)]
enum Damage {
    Flip { at: usize, bit: u8 },
    Set { at: usize, byte: u8 },
    Insert { at: usize, bytes: Vec<u8> },
    Remove { at: usize, count: usize },
    Truncate { at: usize },
}

impl Damage {
    /// Applies to `bytes`, with positions taken modulo `range`.
    fn apply(&self, bytes: &mut Vec<u8>, range: usize) {
        let place = |at: usize, bytes: &[u8]| (at % range.max(1)).min(bytes.len().saturating_sub(1));
        if bytes.is_empty() {
            return;
        }
        match self {
            Damage::Flip { at, bit } => {
                let at = place(*at, bytes);
                bytes[at] ^= 1 << (bit % 8);
            }
            Damage::Set { at, byte } => {
                let at = place(*at, bytes);
                bytes[at] = *byte;
            }
            Damage::Insert { at, bytes: new } => {
                let at = place(*at, bytes);
                bytes.splice(at..at, new.iter().copied());
            }
            Damage::Remove { at, count } => {
                let at = place(*at, bytes);
                bytes.drain(at..(at + count).min(bytes.len()));
            }
            Damage::Truncate { at } => bytes.truncate(place(*at, bytes)),
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<usize>();
    // Bytes that mean something in JSON and in numbers are likelier to get past the parser.
    let byte = prop_oneof![any::<u8>(), prop::sample::select(b"0123456789-.eE[]{},:\"BF16 \\".to_vec())];
    prop_oneof![
        (at, any::<u8>()).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        (any::<usize>(), byte.clone()).prop_map(|(at, byte)| Damage::Set { at, byte }),
        (any::<usize>(), prop::collection::vec(byte, 1..4))
            .prop_map(|(at, bytes)| Damage::Insert { at, bytes }),
        (any::<usize>(), 1..4usize).prop_map(|(at, count)| Damage::Remove { at, count }),
        any::<usize>().prop_map(|at| Damage::Truncate { at }),
    ]
}

/// A model so small that the header is most of the file.
fn config() -> TinyConfig {
    TinyConfig {
        vocab_size: 4,
        hidden_size: 4,
        intermediate_size: 4,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        ..TinyConfig::dense()
    }
}

/// The undamaged file.
static GOOD: LazyLock<Vec<u8>> =
    LazyLock::new(|| TinyCheckpoint::new(config()).files().remove(SINGLE).expect("one file"));

/// If `checkpoint` opened, every expected tensor must be readable whole, in its shape.
fn still_as_expected(checkpoint: &Checkpoint, config: &TinyConfig) {
    for (name, shape) in config.tensors() {
        let tensor = checkpoint.tensor(&name, Slice::All).unwrap();
        assert_eq!(tensor.shape(), shape, "{name}");
        assert_eq!(tensor.bytes().len(), shape.iter().product::<usize>() * tensor.dtype().size());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_headers_never_panic_and_never_change_expectations(changes in prop::collection::vec(damage(), 1..4)) {
        let config = config();
        let mut file = GOOD.clone();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        for change in &changes {
            change.apply(&mut file, header);
        }
        // Leaked because embedded bytes are static; a few megabytes over the whole run.
        let bytes: &'static [u8] = Box::leak(file.into_boxed_slice());
        match Checkpoint::from_bytes(bytes, "fuzzed", &specs(&config), &OPTIONAL) {
            Ok(checkpoint) => still_as_expected(&checkpoint, &config),
            Err(error) => prop_assert!(error.to_string().contains("fuzzed"), "{}", error),
        }
    }

    #[test]
    fn damaged_data_is_only_data(at in any::<usize>(), byte in any::<u8>()) {
        let config = config();
        let mut file = GOOD.clone();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let at = header + at % (file.len() - header);
        file[at] = byte;
        let bytes: &'static [u8] = Box::leak(file.into_boxed_slice());
        still_as_expected(&Checkpoint::from_bytes(bytes, "fuzzed", &specs(&config), &OPTIONAL).unwrap(), &config);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_indexes_never_panic_and_never_leave_the_directory(changes in prop::collection::vec(damage(), 1..4)) {
        let config = config();
        let model = TinyCheckpoint::new(config.clone())
            .shards(2)
            .edit_bytes(INDEX, move |bytes| {
                let len = bytes.len();
                changes.iter().for_each(|change| change.apply(bytes, len));
            })
            .build();
        match open(model.path(), &config) {
            Ok(checkpoint) => still_as_expected(&checkpoint, &config),
            Err(error) => prop_assert!(error.to_string().contains(&model.path().display().to_string()), "{}", error),
        }
    }
}
