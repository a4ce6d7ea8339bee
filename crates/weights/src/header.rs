//! The safetensors header: read, parsed and checked against the file's size before any tensor is touched.
//!
//! Format: 8 bytes little-endian header length, a JSON object (name to dtype, shape, data_offsets; `__metadata__` for
//! strings), then the data. The offsets must cover the data exactly: no gap, no overlap, no byte left over.
//! Entries are checked here one by one so that every message names its tensor; the safetensors crate then validates the
//! whole table again with its own rules.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{Error as _, IntoDeserializer as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::shown;
use crate::json_map::{self, EntryValue, Object};
use crate::storage::Storage;
use crate::{Result, WeightsError};

/// The longest header read, as in the safetensors crate. Qwen2-57B-A14B has under 1 MB in all its shards.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the length field.
const LENGTH_BYTES: u64 = 8;
/// The most dimensions a tensor may have: bounds what a hostile header can make us hold.
const MAX_DIMS: usize = 8;
/// The key that holds strings instead of a tensor.
const METADATA: &str = "__metadata__";

/// Where a tensor lies in its file; checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    /// Element type as stored, possibly one that cannot be loaded.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Offset of the first byte, from the start of the file.
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
}

/// A tensor's entry as written, before any check.
#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: RawShape,
    data_offsets: (u64, u64),
}

/// Dimensions as written, at most [`MAX_DIMS`].
struct RawShape(Vec<u64>);

impl<'de> Deserialize<'de> for RawShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Dims;
        impl<'de> Visitor<'de> for Dims {
            type Value = RawShape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an array of at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<RawShape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if dims.len() == MAX_DIMS {
                        return Err(A::Error::invalid_length(MAX_DIMS + 1, &self));
                    }
                    dims.push(dim);
                }
                Ok(RawShape(dims))
            }
        }
        deserializer.deserialize_seq(Dims)
    }
}

/// An entry of the header object.
enum Entry {
    Tensor(RawInfo),
    Metadata,
}

impl EntryValue for Entry {
    fn read<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> std::result::Result<Self, A::Error> {
        if key == METADATA {
            return map.next_value::<Option<HashMap<String, String>>>().map(|_| Entry::Metadata);
        }
        map.next_value().map(|Object(info)| Entry::Tensor(info))
    }
}

/// Reads and checks the header of one file.
pub(crate) fn read(storage: &Storage) -> Result<BTreeMap<String, Stored>> {
    let file = storage.origin();
    let text = read_text(storage)?;
    let data_start = LENGTH_BYTES + text.len() as u64;
    check(file, parse(file, &text)?, data_start, storage.len().saturating_sub(data_start))
}

/// The JSON bytes, once the length field has been found to fit the file.
fn read_text(storage: &Storage) -> Result<Vec<u8>> {
    let file = storage.origin();
    let size = storage.len();
    let refuse = |field, found: String, expected: String| {
        Err(WeightsError::Header { file: file.to_owned(), field, found, expected })
    };
    let read = |buffer: &mut [u8], offset: u64| {
        let len = buffer.len() as u64;
        storage.read_exact_at(buffer, offset).map_err(|source| WeightsError::Read {
            file: file.to_owned(),
            tensor: "(header)".to_owned(),
            offset,
            len,
            source,
        })
    };

    let mut head = [0u8; 64];
    let head_len = usize::try_from(size).unwrap_or(usize::MAX).min(head.len());
    let head = &mut head[..head_len];
    read(head, 0)?;
    if head.starts_with(b"version https://git-lfs") {
        return Err(WeightsError::GitLfsPointer { file: file.to_owned(), bytes: size });
    }
    if let Some(found) = foreign_kind(head) {
        return Err(WeightsError::NotSafetensors { file: file.to_owned(), found });
    }
    let Some((length, _)) = head.split_first_chunk::<8>() else {
        let expected = "at least the 8 bytes of the header length; download the file again".to_owned();
        return refuse("file size", format!("{size} bytes"), expected);
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return refuse("header length", length.to_string(), format!("at most {MAX_HEADER_BYTES} bytes"));
    }
    if length > size - LENGTH_BYTES {
        let expected = format!(
            "at most the {} bytes that follow in a file of {size} bytes; the file is cut short, download it again",
            size - LENGTH_BYTES
        );
        return refuse("header length", length.to_string(), expected);
    }
    // At most MAX_HEADER_BYTES and at most the file: this cannot exhaust memory or wrap.
    let mut text = vec![0; length as usize];
    read(&mut text, LENGTH_BYTES)?;
    if text.first() != Some(&b'{') {
        let found = text.first().map_or("nothing".to_owned(), |b| format!("byte 0x{b:02x}"));
        return refuse("header", found, "a JSON object that begins with `{`".to_owned());
    }
    if let Err(error) = std::str::from_utf8(&text) {
        return refuse(
            "header",
            format!("invalid UTF-8 at byte {}", error.valid_up_to()),
            "UTF-8".to_owned(),
        );
    }
    Ok(text)
}

/// Files that people rename or download by mistake, told by their first bytes.
fn foreign_kind(head: &[u8]) -> Option<&'static str> {
    let trimmed = head.trim_ascii_start();
    match head {
        _ if head.starts_with(b"PK\x03\x04") => Some("a zip archive (PyTorch's .bin and .pt files are such)"),
        _ if head.starts_with(b"GGUF") => Some("a GGUF file"),
        _ if head.starts_with(b"\x1f\x8b") => Some("a gzip archive"),
        _ if head.starts_with(b"\x89HDF") => Some("an HDF5 file"),
        _ if trimmed.starts_with(b"<!") || trimmed.starts_with(b"<html") => Some("a web page"),
        _ => None,
    }
}

/// The entries as written.
fn parse(file: &str, text: &[u8]) -> Result<Vec<(String, RawInfo)>> {
    let entries = json_map::parse_object::<Entry>(text).map_err(|(key, error)| match key {
        Some(tensor) if tensor != METADATA => WeightsError::TensorHeader {
            file: file.to_owned(),
            tensor,
            field: "header entry",
            found: shown(&error.to_string()),
            expected: "one entry {dtype, shape, data_offsets: [begin, end]} of non-negative integers"
                .to_owned(),
        },
        key => WeightsError::Header {
            file: file.to_owned(),
            field: if key.is_some() { METADATA } else { "header" },
            found: shown(&error.to_string()),
            expected: if key.is_some() { "one object of strings" } else { "one JSON object" }.to_owned(),
        },
    })?;
    let tensors = entries.into_iter().filter_map(|(name, entry)| match entry {
        Entry::Tensor(info) => Some((name, info)),
        Entry::Metadata => None,
    });
    Ok(tensors.collect())
}

/// Checks every entry by itself, then that together they tile the data.
fn check(
    file: &str,
    entries: Vec<(String, RawInfo)>,
    data_start: u64,
    data_len: u64,
) -> Result<BTreeMap<String, Stored>> {
    let mut spans = Vec::with_capacity(entries.len());
    for (name, raw) in entries {
        let (info, end) = check_entry(file, &name, raw, data_len)?;
        spans.push((name, info, end));
    }
    spans.sort_by_key(|(_, info, end)| (info.offset, *end));

    let mut covered = 0;
    let mut previous: Option<&str> = None;
    for (name, info, end) in &spans {
        if info.offset != covered {
            let overlap = info.offset < covered;
            return Err(WeightsError::TensorHeader {
                file: file.to_owned(),
                tensor: name.clone(),
                field: "data_offsets",
                found: format!(
                    "[{}, {end}] ({})",
                    info.offset,
                    if overlap { "overlaps another tensor" } else { "leaves a hole" }
                ),
                expected: match previous {
                    Some(previous) => format!("begin {covered}, where `{}` ends", shown(previous)),
                    None => "begin 0: the first tensor starts the data".to_owned(),
                },
            });
        }
        covered = *end;
        previous = Some(name);
    }
    if covered != data_len {
        return Err(WeightsError::Header {
            file: file.to_owned(),
            field: "file size",
            found: format!("{data_len} bytes of data, {} of them behind the last tensor", data_len - covered),
            expected: format!("exactly the {covered} bytes that the header describes"),
        });
    }
    confirm(file, &spans)?;
    let absolute = |info: Stored| Stored { offset: info.offset + data_start, ..info };
    Ok(spans.into_iter().map(|(name, info, _)| (name, absolute(info))).collect())
}

/// Checks one entry; the offset of the result is still relative to the data. Also returns the end offset.
fn check_entry(file: &str, name: &str, raw: RawInfo, data_len: u64) -> Result<(Stored, u64)> {
    let refuse = |field, found: String, expected: String| {
        Err(WeightsError::TensorHeader {
            file: file.to_owned(),
            tensor: name.to_owned(),
            field,
            found,
            expected,
        })
    };
    let (begin, end) = raw.data_offsets;
    let deserializer: StrDeserializer<'_, ValueError> = raw.dtype.as_str().into_deserializer();
    let Ok(dtype) = Dtype::deserialize(deserializer) else {
        return refuse(
            "dtype",
            format!("`{}`", shown(&raw.dtype)),
            "a safetensors dtype such as BF16".to_owned(),
        );
    };
    let dims: std::result::Result<Vec<usize>, _> = raw.shape.0.iter().map(|&d| usize::try_from(d)).collect();
    let bits = dims.as_ref().ok().and_then(|dims| {
        dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).and_then(|n| n.checked_mul(dtype.bitsize()))
    });
    let (Ok(shape), Some(bits)) = (dims, bits) else {
        let expected = "a shape whose size in bytes fits the address space".to_owned();
        return refuse("shape", format!("{:?} of {dtype}", raw.shape.0), expected);
    };
    if bits % 8 != 0 {
        return refuse(
            "shape",
            format!("{shape:?} of {dtype}: {bits} bits"),
            "a whole number of bytes".to_owned(),
        );
    }
    let bytes = (bits / 8) as u64;
    if end.checked_sub(begin) != Some(bytes) {
        let expected = format!("a span of {bytes} bytes: shape {shape:?} of {dtype}");
        return refuse("data_offsets", format!("[{begin}, {end}]"), expected);
    }
    if end > data_len {
        let expected =
            format!("at most {data_len}, the bytes of data in the file; it is cut short, download it again");
        return refuse("data_offsets", format!("[{begin}, {end}]"), expected);
    }
    Ok((Stored { dtype, shape, offset: begin, bytes }, end))
}

/// The safetensors crate's own verdict on the same table, so that no file passes here that other readers refuse.
fn confirm(file: &str, spans: &[(String, Stored, u64)]) -> Result<()> {
    let refuse = |found: String| WeightsError::Header {
        file: file.to_owned(),
        field: "header",
        found,
        expected: "a table of tensors that the safetensors format allows".to_owned(),
    };
    let table = spans.iter().map(|(name, info, end)| {
        let begin = usize::try_from(info.offset).map_err(|e| refuse(e.to_string()))?;
        let end = usize::try_from(*end).map_err(|e| refuse(e.to_string()))?;
        Ok((
            name.clone(),
            TensorInfo { dtype: info.dtype, shape: info.shape.clone(), data_offsets: (begin, end) },
        ))
    });
    Metadata::new(None, table.collect::<Result<Vec<_>>>()?)
        .map(|_| ())
        .map_err(|error| refuse(shown(&error.to_string())))
}
