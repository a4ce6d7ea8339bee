//! Every way a checkpoint can be wrong is refused when it is opened, with a message that names the file and the tensor
//! or field; nothing panics.

mod common;

use common::{OPTIONAL, open, specs};
use longhaul_testkit::{TinyCheckpoint, TinyConfig, TinyTensor, edit_header, encode_safetensors};
use longhaul_weights::{Checkpoint, TensorSpec};
use serde_json::{Map, Value, json};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The middle one of three shards.
const SHARD: &str = "model-00002-of-00003.safetensors";
const NORM: &str = "model.norm.weight";
const UP: &str = "model.layers.0.mlp.up_proj.weight";

/// A broken checkpoint and what its message must contain.
struct Case {
    what: &'static str,
    checkpoint: TinyCheckpoint,
    message: &'static [&'static str],
}

fn dense() -> TinyCheckpoint {
    TinyCheckpoint::dense()
}

fn header(what: &'static str, edit: fn(&mut Map<String, Value>), message: &'static [&'static str]) -> Case {
    Case { what, checkpoint: dense().edit_header(SINGLE, edit), message }
}

fn bytes(what: &'static str, edit: fn(&mut Vec<u8>), message: &'static [&'static str]) -> Case {
    Case { what, checkpoint: dense().edit_bytes(SINGLE, edit), message }
}

fn index(what: &'static str, edit: fn(&mut Value), message: &'static [&'static str]) -> Case {
    Case { what, checkpoint: dense().shards(3).edit_json(INDEX, edit), message }
}

fn tensors(what: &'static str, edit: fn(&mut Vec<TinyTensor>), message: &'static [&'static str]) -> Case {
    Case { what, checkpoint: dense().edit_tensors(edit), message }
}

/// Replaces the header's text: the file becomes length, `text`, data.
fn replace_header(file: &mut Vec<u8>, text: &str) {
    let old = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let data = file.split_off(8 + old);
    *file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(text.as_bytes());
    file.extend_from_slice(&data);
}

fn set_length(file: &mut [u8], length: u64) {
    file[..8].copy_from_slice(&length.to_le_bytes());
}

/// The header as text.
fn header_text(file: &[u8]) -> String {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    String::from_utf8(file[8..8 + length].to_vec()).unwrap()
}

fn find<'a>(tensors: &'a mut [TinyTensor], name: &str) -> &'a mut TinyTensor {
    tensors.iter_mut().find(|t| t.name == name).unwrap()
}

/// The file itself: length field, header text, truncation, other formats.
fn file_cases() -> Vec<Case> {
    vec![
        bytes("empty file", |b| b.clear(), &[SINGLE, "file size", "0 bytes"]),
        bytes("seven bytes", |b| b.truncate(7), &[SINGLE, "file size", "7 bytes"]),
        bytes("only the length", |b| b.truncate(8), &[SINGLE, "header length", "cut short"]),
        bytes("cut within the header", |b| b.truncate(200), &[SINGLE, "header length", "download"]),
        bytes("one byte short", |b| b.truncate(b.len() - 1), &[SINGLE, "data_offsets", "cut short"]),
        bytes("half the data", |b| b.truncate(b.len() / 2), &[SINGLE, "data_offsets", "cut short"]),
        bytes("one byte behind the data", |b| b.push(0), &[SINGLE, "file size", "1 of them behind"]),
        bytes("a page behind the data", |b| b.extend([0; 4096]), &[SINGLE, "file size", "4096 of them"]),
        bytes("length zero", |b| set_length(b, 0), &[SINGLE, "header", "found nothing"]),
        bytes("length one", |b| set_length(b, 1), &[SINGLE, "header", "EOF"]),
        bytes(
            "length u64::MAX",
            |b| set_length(b, u64::MAX),
            &[SINGLE, "header length", "18446744073709551615"],
        ),
        bytes(
            "length i64::MIN",
            |b| set_length(b, 1 << 63),
            &[SINGLE, "header length", "9223372036854775808"],
        ),
        bytes(
            "length 100 MB and one",
            |b| set_length(b, 100_000_001),
            &[SINGLE, "header length", "100000001"],
        ),
        bytes(
            "length behind the file",
            |b| set_length(b, 99_999_999),
            &[SINGLE, "header length", "99999999"],
        ),
        bytes(
            "length one too small",
            |b| {
                let length = header_text(b).trim_end().len() as u64 - 1;
                set_length(b, length);
            },
            &[SINGLE, "EOF"],
        ),
        bytes(
            "length reaches into the data",
            |b| {
                let length = header_text(b).len() as u64 + 9;
                set_length(b, length);
            },
            &[SINGLE, "header"],
        ),
        bytes("header begins with a space", |b| b[8] = b' ', &[SINGLE, "header", "0x20", "`{`"]),
        bytes("header is an array", |b| replace_header(b, "[]"), &[SINGLE, "header", "0x5b"]),
        bytes("header is not JSON", |b| replace_header(b, "{nonsense}"), &[SINGLE, "header", "line 1"]),
        bytes("header is not UTF-8", |b| b[20] = 0xff, &[SINGLE, "UTF-8", "byte 12"]),
        bytes("two JSON objects", |b| replace_header(b, "{}{}"), &[SINGLE, "header", "trailing"]),
        bytes(
            "no tensors but data",
            |b| replace_header(b, "{}"),
            &[SINGLE, "file size", "behind the last tensor"],
        ),
        bytes(
            "deep nesting",
            |b| replace_header(b, &format!("{{\"x\":{}", "[".repeat(1_000_000))),
            &[SINGLE, "`x`", "header entry"],
        ),
        bytes(
            "the same tensor twice",
            |b| {
                let text = header_text(b).trim_end().replacen(
                    '{',
                    &format!("{{\"{NORM}\":{{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[0,0]}},"),
                    1,
                );
                replace_header(b, &text);
            },
            &[SINGLE, NORM, "twice"],
        ),
        bytes(
            "git-lfs pointer",
            |b| *b = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".to_vec(),
            &[SINGLE, "git-lfs pointer", "git lfs pull"],
        ),
        bytes("web page", |b| *b = b"<!DOCTYPE html><title>404</title>".to_vec(), &[SINGLE, "web page"]),
        bytes("renamed pickle", |b| *b = b"PK\x03\x04archive/data.pkl".to_vec(), &[SINGLE, "zip", "PyTorch"]),
        bytes("renamed GGUF", |b| *b = b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), &[SINGLE, "GGUF"]),
    ]
}

/// One entry of the header.
fn entry_cases() -> Vec<Case> {
    vec![
        header("unknown dtype", |h| h[NORM]["dtype"] = json!("BF17"), &[SINGLE, NORM, "dtype", "BF17"]),
        header("dtype is a number", |h| h[NORM]["dtype"] = json!(16), &[SINGLE, NORM, "header entry"]),
        header(
            "dtype is missing",
            |h| drop(h[NORM].as_object_mut().unwrap().remove("dtype")),
            &[NORM, "dtype"],
        ),
        header(
            "shape is missing",
            |h| drop(h[NORM].as_object_mut().unwrap().remove("shape")),
            &[NORM, "shape"],
        ),
        header(
            "no offsets",
            |h| drop(h[NORM].as_object_mut().unwrap().remove("data_offsets")),
            &[NORM, "data_offsets"],
        ),
        header("entry is a string", |h| h[NORM] = json!("x"), &[SINGLE, NORM, "header entry"]),
        header(
            "entry is an array of the fields",
            |h| h[NORM] = json!(["BF16", [64], [164_864, 164_992]]),
            &[SINGLE, NORM, "a JSON object"],
        ),
        header("entry is null", |h| h[NORM] = Value::Null, &[SINGLE, NORM, "header entry"]),
        header("negative dimension", |h| h[NORM]["shape"] = json!([-64]), &[SINGLE, NORM, "-64"]),
        header("fractional dimension", |h| h[NORM]["shape"] = json!([64.5]), &[SINGLE, NORM, "64.5"]),
        header("shape overflows", |h| h[NORM]["shape"] = json!([u64::MAX, 2]), &[SINGLE, NORM, "shape"]),
        header("bytes overflow", |h| h[NORM]["shape"] = json!([1u64 << 62, 2]), &[SINGLE, NORM, "shape"]),
        header("bits overflow", |h| h[NORM]["shape"] = json!([1u64 << 60]), &[SINGLE, NORM, "shape"]),
        header(
            "nine dimensions",
            |h| h[NORM]["shape"] = json!([1, 1, 1, 1, 1, 1, 1, 1, 64]),
            &[NORM, "8 dimensions"],
        ),
        header(
            "shape larger than the span",
            |h| h[NORM]["shape"] = json!([65]),
            &[NORM, "data_offsets", "130 bytes"],
        ),
        header(
            "shape smaller than the span",
            |h| h[NORM]["shape"] = json!([63]),
            &[NORM, "data_offsets", "126"],
        ),
        header(
            "dtype wider than the span",
            |h| h[NORM]["dtype"] = json!("F32"),
            &[NORM, "data_offsets", "256"],
        ),
        header(
            "four-bit dtype, odd count",
            |h| {
                h[NORM]["dtype"] = json!("F4");
                h[NORM]["shape"] = json!([3]);
            },
            &[NORM, "shape", "12 bits"],
        ),
        header("one offset", |h| h[NORM]["data_offsets"] = json!([0]), &[NORM, "header entry"]),
        header("three offsets", |h| h[NORM]["data_offsets"] = json!([0, 1, 2]), &[NORM, "header entry"]),
        header("negative offset", |h| h[NORM]["data_offsets"][0] = json!(-1), &[NORM, "-1"]),
        header(
            "reversed offsets",
            |h| {
                let (begin, end) = (h[NORM]["data_offsets"][0].clone(), h[NORM]["data_offsets"][1].clone());
                h[NORM]["data_offsets"] = json!([end, begin]);
            },
            &[NORM, "data_offsets", "span of 128 bytes"],
        ),
        header(
            "offsets behind the file",
            |h| {
                h[NORM]["data_offsets"] = json!([1u64 << 40, (1u64 << 40) + 128]);
            },
            &[NORM, "data_offsets", "at most"],
        ),
        header(
            "offsets at the end of u64",
            |h| {
                h[NORM]["data_offsets"] = json!([u64::MAX - 128, u64::MAX]);
            },
            &[NORM, "data_offsets"],
        ),
        header(
            "overlap",
            |h| h[NORM]["data_offsets"] = json!([0, 128]),
            &["data_offsets", "overlaps another tensor"],
        ),
        header(
            "hole at the start",
            |h| drop(h.remove("model.embed_tokens.weight")),
            &["leaves a hole", "begin 0"],
        ),
        header("hole in the middle", |h| drop(h.remove(UP)), &["leaves a hole", "down_proj", "gate_proj"]),
        header("hole at the end", |h| drop(h.remove(NORM)), &[SINGLE, "128 of them behind the last tensor"]),
        header(
            "metadata of numbers",
            |h| h["__metadata__"] = json!({"format": 1}),
            &[SINGLE, "__metadata__"],
        ),
        header("metadata is a list", |h| h["__metadata__"] = json!(["pt"]), &[SINGLE, "__metadata__"]),
    ]
}

/// Well-formed files that are not the model's.
fn model_cases() -> Vec<Case> {
    vec![
        tensors("a tensor is missing", |t| t.retain(|t| t.name != UP), &["missing 1 of 26 tensors", UP]),
        tensors("most are missing", |t| t.truncate(3), &["missing 23 of 26", "and 19 more"]),
        tensors(
            "misspelt name",
            |t| find(t, UP).name = "model.layers.0.mlp.up_proj.weights".to_owned(),
            &["missing 1 of 26", "found similar `model.layers.0.mlp.up_proj.weights`"],
        ),
        tensors(
            "prefixed names",
            |t| t.iter_mut().for_each(|t| t.name = format!("base.{}", t.name)),
            &[
                "missing 26 of 26",
                "`model.embed_tokens.weight` (found similar `base.model.embed_tokens.weight`)",
            ],
        ),
        tensors(
            "transposed",
            |t| find(t, UP).shape.reverse(),
            &[SINGLE, UP, "found shape [64, 96]", "expected [96, 64]"],
        ),
        tensors(
            "one more dimension",
            |t| find(t, NORM).shape.push(1),
            &[SINGLE, NORM, "[64, 1]", "expected [64]"],
        ),
        tensors(
            "integer weights",
            |t| find(t, UP).dtype = "I16".to_owned(),
            &[SINGLE, UP, "I16", "expected BF16"],
        ),
        tensors(
            "eight-bit floats",
            |t| {
                let up = find(t, UP);
                up.dtype = "F8_E4M3".to_owned();
                up.data.truncate(96 * 64);
            },
            &[SINGLE, UP, "F8_E4M3", "quantised"],
        ),
        tensors(
            "GPTQ",
            |t| find(t, UP).name = UP.replace(".weight", ".qweight"),
            &["up_proj.qweight", "quantised"],
        ),
        tensors(
            "extra tensors",
            |t| {
                for name in ["a", "b", "c", "d", "e", "f"] {
                    t.push(TinyTensor { name: format!("extra.{name}"), ..t[0].clone() });
                }
            },
            &["6 tensor(s)", "`extra.a`", "`extra.d` and 2 more"],
        ),
        tensors(
            "an optional name inside another",
            |t| t.push(TinyTensor { name: "xlm_head.weight".to_owned(), ..t[0].clone() }),
            &["xlm_head.weight"],
        ),
        tensors(
            "a bias that the model has not",
            |t| {
                let bias = TinyTensor {
                    name: "model.layers.0.self_attn.o_proj.bias".to_owned(),
                    ..find(t, NORM).clone()
                };
                t.push(bias);
            },
            &["1 tensor(s)", "o_proj.bias"],
        ),
        Case {
            what: "another model",
            checkpoint: TinyCheckpoint::moe(),
            message: &["missing", "mlp.gate_proj.weight"],
        },
    ]
}

/// The index and its agreement with the shards.
fn index_cases() -> Vec<Case> {
    fn weight_map(index: &mut Value) -> &mut Map<String, Value> {
        index["weight_map"].as_object_mut().unwrap()
    }
    let mut cases = vec![
        index("empty object", |i| *i = json!({}), &[INDEX, "weight_map"]),
        index("an array", |i| *i = json!([i["weight_map"]]), &[INDEX, "shard index", "a JSON object"]),
        index("weight_map is a list", |i| i["weight_map"] = json!([]), &[INDEX, "weight_map"]),
        index("weight_map is empty", |i| i["weight_map"] = json!({}), &[INDEX, "weight_map", "no entries"]),
        index("a number for a shard", |i| i["weight_map"][NORM] = json!(3), &[INDEX, NORM, "integer `3`"]),
        index(
            "an absent shard",
            |i| i["weight_map"][NORM] = json!("gone.safetensors"),
            &[INDEX, "gone.safetensors", "1 of 4 shards absent"],
        ),
        index("a pickle for a shard", |i| i["weight_map"][NORM] = json!("x.bin"), &[INDEX, NORM, "x.bin"]),
        index(
            "no entry for a stored tensor",
            |i| drop(weight_map(i).remove(NORM)),
            &[INDEX, NORM, "no entry"],
        ),
        index(
            "an entry for an absent tensor",
            |i| i["weight_map"]["ghost"] = json!("model-00001-of-00003.safetensors"),
            &[INDEX, "ghost", "no such tensor"],
        ),
        index(
            "the wrong shard",
            |i| i["weight_map"][NORM] = json!("model-00001-of-00003.safetensors"),
            &[INDEX, NORM, "model-00003-of-00003.safetensors"],
        ),
        Case {
            what: "index is not JSON",
            checkpoint: dense().shards(3).edit_bytes(INDEX, |b| b.truncate(40)),
            message: &[INDEX, "shard index", "EOF"],
        },
        Case {
            what: "index is a git-lfs pointer",
            checkpoint: dense()
                .shards(3)
                .edit_bytes(INDEX, |b| *b = b"version https://git-lfs.github.com/x".to_vec()),
            message: &[INDEX, "git-lfs"],
        },
        Case {
            what: "index names a tensor twice",
            checkpoint: dense().shards(3).edit_bytes(INDEX, |b| {
                let text = String::from_utf8(b.clone()).unwrap();
                let twice = format!("\"weight_map\": {{ \"{NORM}\": \"a.safetensors\",");
                *b = text.replacen("\"weight_map\": {", &twice, 1).into_bytes();
            }),
            message: &[INDEX, NORM, "twice"],
        },
        Case {
            what: "a shard was not downloaded",
            checkpoint: dense().shards(3).remove(SHARD),
            message: &[INDEX, SHARD, "1 of 3 shards absent", "download"],
        },
        Case {
            what: "a shard is cut short",
            checkpoint: dense().shards(3).edit_bytes(SHARD, |b| b.truncate(b.len() - 10)),
            message: &[SHARD, "cut short"],
        },
        Case {
            what: "a shard is a git-lfs pointer",
            checkpoint: dense()
                .shards(3)
                .edit_bytes(SHARD, |b| *b = b"version https://git-lfs.github.com/x".to_vec()),
            message: &[SHARD, "git-lfs"],
        },
        Case {
            what: "a tensor in two shards",
            checkpoint: dense().shards(2).edit_bytes("model-00001-of-00002.safetensors", |b| {
                *b = encode_safetensors(&[TinyTensor {
                    name: NORM.to_owned(),
                    dtype: "BF16".to_owned(),
                    shape: vec![64],
                    data: vec![0; 128],
                }]);
            }),
            message: &[NORM, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        },
    ];
    let names = [
        "../evil.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        "",
        "C:x.safetensors",
    ];
    cases.extend(names.map(|name| Case {
        what: name,
        checkpoint: dense().shards(3).edit_json(INDEX, move |i| i["weight_map"][NORM] = json!(name)),
        message: &[INDEX, NORM, "bare name"],
    }));
    cases
}

/// Directories without a checkpoint.
fn directory_cases() -> Vec<Case> {
    vec![
        Case {
            what: "only a pickle",
            checkpoint: dense().remove(SINGLE).edit_bytes("pytorch_model.bin", |b| b.push(1)),
            message: &["pytorch_model.bin", "only safetensors is read", "save_pretrained"],
        },
        Case {
            what: "shards without an index",
            checkpoint: dense().shards(2).remove(INDEX),
            message: &["model-00001-of-00002.safetensors", "no index", INDEX],
        },
        Case {
            what: "no weights",
            checkpoint: dense().remove(SINGLE),
            message: &["other entries", "config.json"],
        },
        Case {
            what: "GGUF",
            checkpoint: dense().remove(SINGLE).edit_bytes("q4_0.gguf", |b| b.push(1)),
            message: &["q4_0.gguf", "GGUF is not read"],
        },
    ]
}

#[test]
fn every_malformed_checkpoint_is_refused_with_its_cause() {
    let cases: Vec<Case> = [file_cases(), entry_cases(), model_cases(), index_cases(), directory_cases()]
        .into_iter()
        .flatten()
        .collect();
    assert!(cases.len() >= 40, "{}", cases.len());
    let config = TinyConfig::dense();
    let mut failures = Vec::new();
    for Case { what, checkpoint, message } in cases {
        let model = checkpoint.build();
        match open(model.path(), &config) {
            Ok(_) => failures.push(format!("{what}: accepted")),
            Err(error) => {
                let text = error.to_string();
                for part in message {
                    if !text.contains(part) {
                        failures.push(format!("{what}: `{part}` is not in: {text}"));
                    }
                }
                if text.len() > 2000 || text.contains(['\n', '\u{1b}']) {
                    failures.push(format!("{what}: unfit for a terminal: {text}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn missing_empty_and_wrong_directories() {
    let dir = tempfile::tempdir().unwrap();
    let message = |path: &std::path::Path| open(path, &TinyConfig::dense()).unwrap_err().to_string();
    assert!(message(&dir.path().join("nowhere")).contains("no such directory"));
    assert!(message(dir.path()).contains("empty directory"));
    let file = dir.path().join("model.safetensors");
    std::fs::write(&file, b"x").unwrap();
    assert!(message(&file).contains("expected a model directory, found a file"));
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    assert!(message(dir.path()).contains("not a regular file"));
}

#[cfg(unix)]
#[test]
fn a_dangling_link_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("../blobs/gone", dir.path().join(SINGLE)).unwrap();
    let error = open(dir.path(), &TinyConfig::dense()).unwrap_err().to_string();
    assert!(error.contains(SINGLE) && error.contains("cannot open"), "{error}");
}

#[test]
fn embedded_bytes_are_checked_as_files_are() {
    let files = TinyCheckpoint::dense().files();
    let good: &'static [u8] = Box::leak(files[SINGLE].clone().into_boxed_slice());
    let specs: Vec<TensorSpec> = specs(&TinyConfig::dense());
    assert!(Checkpoint::from_bytes(good, "demo", &specs, &OPTIONAL).is_ok());
    let error =
        Checkpoint::from_bytes(&good[..good.len() - 1], "demo", &specs, &OPTIONAL).unwrap_err().to_string();
    assert!(error.starts_with("demo: ") && error.contains("cut short"), "{error}");
    let edited = edit_header(good, |h| h[NORM]["shape"] = json!([8, 8]));
    let error =
        Checkpoint::from_bytes(Box::leak(edited.into_boxed_slice()), "demo", &specs, &OPTIONAL).unwrap_err();
    assert!(error.to_string().contains("[8, 8]"), "{error}");
}
