//! What is read is what is stored, whole or in slices, and only the slice is read.

mod common;

use common::{OPTIONAL, open, specs};
use longhaul_backend::DType;
use longhaul_testkit::{Golden, TinyCheckpoint, TinyConfig, TinyTensor, golden_cases};
use longhaul_weights::{Checkpoint, Slice, TensorSource, TensorSpec};
use safetensors::SafeTensors;

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
const BIAS: &str = "model.layers.0.self_attn.k_proj.bias";

/// Rows and columns of `bytes`, cut out with plain indexing.
fn cut(
    bytes: &[u8],
    cols: usize,
    size: usize,
    rows: std::ops::Range<usize>,
    part: std::ops::Range<usize>,
) -> Vec<u8> {
    rows.flat_map(|r| bytes[(r * cols + part.start) * size..(r * cols + part.end) * size].to_vec()).collect()
}

#[test]
fn every_layout_and_dtype_reads_back_what_the_reference_crate_reads() {
    for config in [TinyConfig::dense(), TinyConfig::moe()] {
        for (dtype, size) in [(DType::BF16, 2), (DType::F16, 2), (DType::F32, 4)] {
            for shards in [1, 2, 5] {
                let build = || TinyCheckpoint::new(config.clone()).dtype(dtype).shards(shards);
                let model = build().build();
                let checkpoint = open(model.path(), &config).unwrap();
                let mut total = 0;
                for (_, bytes) in build().files().iter().filter(|(name, _)| name.ends_with(".safetensors")) {
                    for (name, view) in SafeTensors::deserialize(bytes).unwrap().iter() {
                        let read = checkpoint.tensor(name, Slice::All).unwrap();
                        assert_eq!((read.dtype(), read.shape()), (dtype, view.shape()), "{name}");
                        assert_eq!(read.bytes(), view.data(), "{name}");
                        total += (view.shape().iter().product::<usize>() * size) as u64;
                    }
                }
                assert_eq!((checkpoint.total_bytes(), checkpoint.bytes_read()), (total, total));
            }
        }
    }
}

#[test]
fn slices_are_exact_and_read_only_their_part() {
    let config = TinyConfig::dense();
    let model = TinyCheckpoint::new(config.clone()).build();
    let whole = open(model.path(), &config).unwrap().tensor(DOWN, Slice::All).unwrap().bytes().to_vec();
    let (rows, cols, size) = (64, 96, 2);
    for (start, end) in [(0, 0), (0, 1), (0, 32), (32, 64), (5, 17), (63, 64), (0, 64)] {
        let checkpoint = open(model.path(), &config).unwrap();
        let part = checkpoint.tensor(DOWN, Slice::Rows(start..end)).unwrap();
        assert_eq!(part.shape(), [end - start, cols]);
        assert_eq!(part.bytes(), cut(&whole, cols, size, start..end, 0..cols));
        assert_eq!(checkpoint.bytes_read(), ((end - start) * cols * size) as u64);
    }
    for (start, end) in [(0, 0), (0, 1), (0, 48), (48, 96), (7, 19), (95, 96), (0, 96), (0, 70), (20, 96)] {
        let checkpoint = open(model.path(), &config).unwrap();
        let part = checkpoint.tensor(DOWN, Slice::Cols(start..end)).unwrap();
        assert_eq!(part.shape(), [rows, end - start]);
        assert_eq!(part.bytes(), cut(&whole, cols, size, 0..rows, start..end), "columns {start}..{end}");
        assert_eq!(checkpoint.bytes_read(), (rows * (end - start) * size) as u64, "columns {start}..{end}");
    }
    let checkpoint = open(model.path(), &config).unwrap();
    let bias = checkpoint.tensor(BIAS, Slice::All).unwrap().to_f32();
    assert_eq!(checkpoint.tensor(BIAS, Slice::Rows(3..9)).unwrap().to_f32(), bias[3..9]);
}

/// The path that reads nearly whole rows in batches: the batch must hold many rows, not divide their count, and the last
/// row must not be read past the end of the file.
#[test]
fn nearly_whole_rows_are_read_in_batches() {
    let (rows, cols) = (4097, 1100);
    let values: Vec<f32> = (0..rows * cols).map(|i| (i % 4093) as f32).collect();
    let tensors = vec![TinyTensor::new("w", DType::F32, &[rows, cols], &values)];
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), longhaul_testkit::encode_safetensors(&tensors))
        .unwrap();
    let spec = [TensorSpec::new("w", [rows, cols])];
    for (start, end) in [(0, 1000), (100, 1100), (90, 1050)] {
        let checkpoint = Checkpoint::open(dir.path(), &spec, &[]).unwrap();
        let part = checkpoint.tensor("w", Slice::Cols(start..end)).unwrap();
        assert!(
            part.bytes() == cut(&tensors[0].data, cols, 4, 0..rows, start..end),
            "columns {start}..{end}"
        );
        let exact = (rows * (end - start) * 4) as u64;
        let read = checkpoint.bytes_read();
        assert!(read >= exact && read <= exact * 5 / 4, "read {read} bytes for {exact}");
    }
}

#[test]
fn slices_outside_and_unknown_names_are_errors() {
    let config = TinyConfig::dense();
    let model = TinyCheckpoint::new(config.clone()).build();
    let checkpoint = open(model.path(), &config).unwrap();
    for slice in [Slice::Rows(0..65), Slice::Cols(90..97)] {
        let error = checkpoint.tensor(DOWN, slice).unwrap_err().to_string();
        assert!(error.contains(DOWN) && error.contains("[64, 96]"), "{error}");
    }
    assert!(checkpoint.tensor(BIAS, Slice::Cols(0..1)).is_err());
    let error = checkpoint.tensor("model.nothing", Slice::All).unwrap_err().to_string();
    assert!(error.contains("model.nothing") && error.contains("model.safetensors"), "{error}");
    assert_eq!(checkpoint.bytes_read(), 0);
}

#[test]
fn optional_tensors_are_tolerated_whatever_their_dtype_but_not_loaded() {
    let config = TinyConfig::dense();
    let model = TinyCheckpoint::new(config.clone())
        .edit_tensors(|tensors| {
            let raw = |name: &str, dtype: &str, shape: Vec<usize>, bytes| TinyTensor {
                name: name.to_owned(),
                dtype: dtype.to_owned(),
                shape,
                data: vec![0; bytes],
            };
            tensors.push(raw("lm_head.weight", "BF16", vec![320, 64], 320 * 64 * 2));
            tensors.push(raw("model.layers.1.self_attn.rotary_emb.inv_freq", "F64", vec![8], 64));
        })
        .build();
    let checkpoint = open(model.path(), &config).unwrap();
    assert!(checkpoint.tensor("lm_head.weight", Slice::All).is_err());
    let plain = TinyCheckpoint::new(config.clone()).build();
    assert_eq!(checkpoint.total_bytes(), open(plain.path(), &config).unwrap().total_bytes());
    assert!(Checkpoint::open(model.path(), &specs(&config), &[]).is_err());
}

#[test]
fn the_single_file_wins_over_an_index_beside_it() {
    let config = TinyConfig::dense();
    let model = TinyCheckpoint::new(config.clone()).seed(1).build();
    let shards = TinyCheckpoint::new(config.clone()).seed(2).shards(2);
    let single = open(model.path(), &config).unwrap().tensor(DOWN, Slice::All).unwrap().bytes().to_vec();
    shards.write(model.path());
    assert_eq!(open(model.path(), &config).unwrap().tensor(DOWN, Slice::All).unwrap().bytes(), single);
    std::fs::remove_file(model.path().join("model.safetensors")).unwrap();
    assert_ne!(open(model.path(), &config).unwrap().tensor(DOWN, Slice::All).unwrap().bytes(), single);
}

#[test]
fn embedded_bytes_are_borrowed_and_equal_to_the_file() {
    let config = TinyConfig::moe();
    let model = TinyCheckpoint::new(config.clone()).build();
    let bytes: &'static [u8] =
        Box::leak(std::fs::read(model.path().join("model.safetensors")).unwrap().into_boxed_slice());
    let embedded = Checkpoint::from_bytes(bytes, "demo", &specs(&config), &OPTIONAL).unwrap();
    let file = open(model.path(), &config).unwrap();
    for (name, shape) in config.tensors() {
        let mut slices = vec![Slice::All, Slice::Rows(0..shape[0] / 2)];
        slices.extend((shape.len() == 2).then(|| Slice::Cols(1..shape[1] / 2)));
        for slice in slices {
            let borrowed = embedded.tensor(&name, slice.clone()).unwrap();
            assert_eq!(
                borrowed.bytes(),
                file.tensor(&name, slice.clone()).unwrap().bytes(),
                "{name} {slice}"
            );
            let inside = bytes.as_ptr_range().contains(&borrowed.bytes().as_ptr());
            // The columns of a one-row matrix are contiguous too.
            assert_eq!(inside, !matches!(slice, Slice::Cols(_)) || shape[0] == 1, "{name} {slice}");
        }
    }
    assert_eq!(embedded.bytes_read(), file.bytes_read());
}

#[test]
fn ranks_read_in_parallel_from_one_checkpoint() {
    let config = TinyConfig::moe();
    let model = TinyCheckpoint::new(config.clone()).shards(3).build();
    let checkpoint = open(model.path(), &config).unwrap();
    let expected: Vec<Vec<u8>> = config
        .tensors()
        .iter()
        .map(|(name, _)| checkpoint.tensor(name, Slice::All).unwrap().bytes().to_vec())
        .collect();
    let before = checkpoint.bytes_read();
    std::thread::scope(|scope| {
        for rank in 0..4 {
            let (checkpoint, expected, tensors) = (&checkpoint, &expected, config.tensors());
            scope.spawn(move || {
                for offset in 0..tensors.len() {
                    let i = (offset + rank * 7) % tensors.len();
                    assert_eq!(checkpoint.tensor(&tensors[i].0, Slice::All).unwrap().bytes(), expected[i]);
                }
            });
        }
    });
    assert_eq!(checkpoint.bytes_read(), before + 4 * checkpoint.total_bytes());
}

#[cfg(unix)]
#[test]
fn a_file_cut_after_it_was_opened_is_an_error_not_a_signal() {
    let config = TinyConfig::dense();
    let model = TinyCheckpoint::new(config.clone()).build();
    let checkpoint = open(model.path(), &config).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(model.path().join("model.safetensors")).unwrap();
    file.set_len(4096).unwrap();
    let error = checkpoint.tensor(DOWN, Slice::All).unwrap_err().to_string();
    assert!(
        error.contains("model.safetensors") && error.contains(DOWN) && error.contains("changed"),
        "{error}"
    );
}

#[test]
fn code_beside_the_weights_does_not_matter() {
    let config = TinyConfig::dense();
    let model = TinyCheckpoint::new(config.clone())
        .edit_config(|c| c["auto_map"] = serde_json::json!({"AutoModelForCausalLM": "evil.Model"}))
        .edit_bytes("evil.py", |b| b.extend_from_slice(b"raise SystemExit"))
        .edit_bytes("pytorch_model.bin", |b| b.extend_from_slice(b"\x80\x02"))
        .build();
    assert!(open(model.path(), &config).is_ok());
}

/// The released layout as transformers writes it (metadata, its order and padding), not as the test kit does.
#[test]
fn golden_checkpoints_open_and_read() {
    for dir in golden_cases() {
        let golden = Golden::load(&dir);
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let size = |key: &str| config[key].as_u64().map(|v| v as usize);
        let mut tiny = TinyConfig {
            vocab_size: golden.vocab,
            hidden_size: size("hidden_size").unwrap(),
            intermediate_size: size("intermediate_size").unwrap(),
            num_hidden_layers: size("num_hidden_layers").unwrap(),
            num_attention_heads: size("num_attention_heads").unwrap(),
            num_key_value_heads: size("num_key_value_heads").unwrap(),
            tie_word_embeddings: config["tie_word_embeddings"].as_bool().unwrap(),
            ..TinyConfig::dense()
        };
        tiny.moe = size("num_experts").map(|experts| longhaul_testkit::TinyMoe {
            experts,
            experts_per_token: size("num_experts_per_tok").unwrap(),
            intermediate_size: size("moe_intermediate_size").unwrap(),
            shared_intermediate_size: size("shared_expert_intermediate_size").unwrap(),
            dense_layers: vec![],
        });
        let checkpoint = open(&dir, &tiny).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        let embeddings = checkpoint.tensor("model.embed_tokens.weight", Slice::All).unwrap();
        assert!(embeddings.to_f32().iter().all(|x| x.is_finite()));
    }
}
