//! A checkpoint of one or more safetensors files, checked as a whole when opened and read in slices afterwards.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use longhaul_backend::HostTensor;

use crate::error::shown;
use crate::expect::{self, Accepted, Located};
use crate::header;
use crate::index::{self, INDEX_FILE, WeightMap};
use crate::slice::Region;
use crate::storage::Storage;
use crate::{Result, Slice, TensorSource, TensorSpec, WeightsError};

/// Name of a checkpoint in one file.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// Bytes read between two updates of the progress counter, and the step in which a buffer is cleared before it is
/// filled (small enough to stay in a core's cache).
const READ_STEP: usize = 1 << 20;
/// Bytes of the buffer through which nearly whole rows are read.
const ROW_BATCH: usize = 4 << 20;

/// A checked safetensors checkpoint: every expected tensor is there, in its shape, within its file.
///
/// Shared by reference between threads; reads are positioned and do not disturb each other.
#[derive(Debug)]
pub struct Checkpoint {
    origin: String,
    shards: Vec<Storage>,
    tensors: HashMap<String, Accepted>,
    total: u64,
    read: AtomicU64,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`: `model.safetensors`, or else the shards of `model.safetensors.index.json` (the
    /// order in which transformers looks).
    ///
    /// `expected` are the tensors the model needs, with their exact shapes. Other tensors are refused unless their name
    /// is in `optional` or ends with `.` and an entry of it (`rotary_emb.inv_freq` allows it in every layer); optional
    /// tensors are never loaded.
    ///
    /// # Errors
    /// [`WeightsError`] for anything that is not exactly as it should be in any header, size, index entry or name.
    pub fn open(dir: &Path, expected: &[TensorSpec], optional: &[&str]) -> Result<Self> {
        match std::fs::metadata(dir) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(WeightsError::NotADirectory { path: dir.to_owned() }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(WeightsError::NoSuchDirectory { dir: dir.to_owned() });
            }
            Err(source) => return Err(WeightsError::Io { path: dir.to_owned(), action: "open", source }),
        }
        // A dangling link counts as present, so that opening it names the file that is wrong.
        let present = |name: &str| dir.join(name).symlink_metadata().is_ok();
        if present(SINGLE_FILE) {
            let storage = Storage::open(&dir.join(SINGLE_FILE))?;
            let origin = storage.origin().to_owned();
            return Self::assemble(origin, vec![storage], None, expected, optional);
        }
        if !present(INDEX_FILE) {
            return Err(describe_absence(dir));
        }
        let path = dir.join(INDEX_FILE);
        let map = index::read(&path)?;
        let names: BTreeSet<&String> = map.values().collect();
        let absent: Vec<&str> = names.iter().filter(|n| !present(n)).map(|n| n.as_str()).collect();
        if let Some(first) = absent.first() {
            return Err(WeightsError::Index {
                file: path.display().to_string(),
                field: "weight_map".to_owned(),
                found: format!("{} of {} shards absent, first `{first}`", absent.len(), names.len()),
                expected: "every shard beside the index; download the absent ones".to_owned(),
            });
        }
        let shards = names.iter().map(|name| Storage::open(&dir.join(name))).collect::<Result<Vec<_>>>()?;
        let origin = path.display().to_string();
        let shard_names: Vec<String> = names.into_iter().cloned().collect();
        Self::assemble(origin, shards, Some((&map, &shard_names)), expected, optional)
    }

    /// A checkpoint in the program's own memory (the embedded demo model); whole tensors and row slices borrow from it.
    ///
    /// `origin` stands for a file name in messages. `expected` and `optional` as for [`Checkpoint::open`].
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(
        bytes: &'static [u8],
        origin: &str,
        expected: &[TensorSpec],
        optional: &[&str],
    ) -> Result<Self> {
        let storage = Storage::Bytes { bytes, origin: origin.to_owned() };
        Self::assemble(origin.to_owned(), vec![storage], None, expected, optional)
    }

    /// Checks all shards, their agreement with the index (the map and the shards' names in order), and the tensors.
    fn assemble(
        origin: String,
        shards: Vec<Storage>,
        index: Option<(&WeightMap, &[String])>,
        expected: &[TensorSpec],
        optional: &[&str],
    ) -> Result<Self> {
        let mut found: BTreeMap<String, Located> = BTreeMap::new();
        for (shard, storage) in shards.iter().enumerate() {
            for (tensor, stored) in header::read(storage)? {
                if let Some(other) = found.get(&tensor) {
                    return Err(WeightsError::TensorInTwoFiles {
                        tensor,
                        first: origin_of(&shards, other.shard),
                        second: storage.origin().to_owned(),
                    });
                }
                found.insert(tensor, Located { shard, stored });
            }
        }
        if let Some((map, names)) = index {
            agree(&origin, map, names, &found)?;
        }
        let tensors = expect::accept(&origin, |shard| origin_of(&shards, shard), found, expected, optional)?;
        // Tensors lie side by side in files, so the sum cannot exceed their sizes.
        let total = tensors.values().map(|t| t.bytes).sum();
        Ok(Self { origin, shards, tensors, total, read: AtomicU64::new(0) })
    }

    /// Reads the pieces of `region` (in elements of `size` bytes) of a tensor into one buffer.
    fn read_region(&self, tensor: &Piece<'_>, region: &Region, size: usize) -> Result<Vec<u8>> {
        let mut buffer = Vec::new();
        let piece = region.piece * size;
        let bytes = piece * region.pieces;
        buffer.try_reserve_exact(bytes).map_err(|_| tensor.out_of_memory(bytes))?;
        if region.pieces == 1 {
            self.append(tensor, &mut buffer, region.start * size, bytes)?;
            return Ok(buffer);
        }
        let (stride, start) = (region.stride * size, region.start * size);
        if piece == 0 {
            return Ok(buffer);
        }
        if (stride - piece) * 4 > piece {
            // One read a row fetches exactly what is needed. It costs a system call a row, which for the family's
            // shapes (rows of a quarter kilobyte and more) is cheaper than reading the other ranks' columns too.
            for row in 0..region.pieces {
                self.append(tensor, &mut buffer, row * stride + start, piece)?;
            }
            return Ok(buffer);
        }
        // Nearly whole rows: read many at once and drop the few columns between.
        let rows_a_batch = (ROW_BATCH / stride).max(1);
        let mut batch = Vec::new();
        for first in (0..region.pieces).step_by(rows_a_batch) {
            let rows = rows_a_batch.min(region.pieces - first);
            // Ends with the last row's piece: the columns behind it belong to nobody here.
            let span = (rows - 1) * stride + piece;
            batch.clear();
            batch.try_reserve_exact(span).map_err(|_| tensor.out_of_memory(span))?;
            self.append(tensor, &mut batch, first * stride + start, span)?;
            for row in batch.chunks(stride) {
                buffer.extend_from_slice(row.get(..piece).unwrap_or(row));
            }
        }
        Ok(buffer)
    }

    /// Appends `len` bytes from `offset` within the tensor to `buffer`, which has room for them.
    fn append(&self, tensor: &Piece<'_>, buffer: &mut Vec<u8>, offset: usize, len: usize) -> Result<()> {
        let mut done = 0;
        while done < len {
            let step = READ_STEP.min(len - done);
            let at = tensor.accepted.offset + (offset + done) as u64;
            let filled = buffer.len();
            buffer.resize(filled + step, 0);
            let target = buffer.get_mut(filled..).unwrap_or_default();
            tensor.storage.read_exact_at(target, at).map_err(|source| WeightsError::Read {
                file: tensor.storage.origin().to_owned(),
                tensor: tensor.name.to_owned(),
                offset: at,
                len: step as u64,
                source,
            })?;
            self.read.fetch_add(step as u64, Ordering::Relaxed);
            done += step;
        }
        Ok(())
    }
}

/// A tensor about to be read.
struct Piece<'a> {
    name: &'a str,
    accepted: &'a Accepted,
    storage: &'a Storage,
}

impl Piece<'_> {
    fn out_of_memory(&self, bytes: usize) -> WeightsError {
        WeightsError::OutOfMemory { tensor: self.name.to_owned(), bytes: bytes as u64 }
    }
}

impl TensorSource for Checkpoint {
    fn tensor(&self, name: &str, slice: Slice) -> Result<HostTensor<'_>> {
        let unknown = || WeightsError::UnknownTensor { file: self.origin.clone(), tensor: name.to_owned() };
        let accepted = self.tensors.get(name).ok_or_else(unknown)?;
        let storage = self.shards.get(accepted.shard).ok_or_else(unknown)?;
        let region = slice.resolve(name, &accepted.shape)?;
        // The checked header bounds every product below by the size of the file.
        let size = accepted.dtype.size();
        let borrowed = (region.pieces == 1)
            .then(|| storage.borrow_at(accepted.offset + (region.start * size) as u64, region.piece * size))
            .flatten();
        let data: Cow<'_, [u8]> = match borrowed {
            Some(data) => {
                self.read.fetch_add(data.len() as u64, Ordering::Relaxed);
                data
            }
            None => self.read_region(&Piece { name, accepted, storage }, &region, size)?.into(),
        };
        HostTensor::new(accepted.dtype, region.shape, data)
            .map_err(|source| WeightsError::Tensor { tensor: name.to_owned(), source })
    }

    fn total_bytes(&self) -> u64 {
        self.total
    }

    fn inventory(&self) -> Vec<String> {
        let line = |(name, t): (&String, &Accepted)| {
            format!("{name} {} {:?} {} bytes at {} of file {}", t.dtype, t.shape, t.bytes, t.offset, t.shard)
        };
        let mut lines: Vec<String> = self.tensors.iter().map(line).collect();
        lines.sort_unstable();
        lines
    }

    fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

fn origin_of(shards: &[Storage], shard: usize) -> String {
    shards.get(shard).map_or_else(String::new, |s| s.origin().to_owned())
}

/// Index and shards must say the same: every indexed tensor in the shard it names, every stored tensor indexed.
fn agree(file: &str, map: &WeightMap, names: &[String], found: &BTreeMap<String, Located>) -> Result<()> {
    let refuse = |tensor: &str, found: String, expected: String| {
        let field = format!("weight_map `{}`", shown(tensor));
        Err(WeightsError::Index { file: file.to_owned(), field, found, expected })
    };
    for (tensor, shard) in map {
        let holder = found.get(tensor).and_then(|located| names.get(located.shard));
        if holder != Some(shard) {
            let actual = match holder {
                Some(other) => format!("the tensor in `{other}`"),
                None => format!("no such tensor in `{shard}` or any other shard"),
            };
            return refuse(tensor, actual, format!("it in `{shard}`; download index and shards again"));
        }
    }
    match found.iter().find(|(tensor, _)| !map.contains_key(*tensor)) {
        Some((tensor, located)) => {
            let shard = names.get(located.shard).cloned().unwrap_or_default();
            refuse(tensor, "no entry".to_owned(), format!("`{shard}`, the shard that holds this tensor"))
        }
        None => Ok(()),
    }
}

/// Says what a directory without a checkpoint holds instead.
fn describe_absence(dir: &Path) -> WeightsError {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(source) => return WeightsError::Io { path: dir.to_owned(), action: "list", source },
    };
    let mut names: Vec<String> =
        entries.filter_map(|e| e.ok()).map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let first_with = |suffixes: &[&str]| names.iter().find(|n| suffixes.iter().any(|s| n.ends_with(s)));
    let (found, remedy) = if names.is_empty() {
        ("an empty directory".to_owned(), "download the model into it")
    } else if let Some(shard) = first_with(&[".safetensors"]) {
        (
            format!("`{}` but no index", shown(shard)),
            "if it is a shard, download model.safetensors.index.json too; if it is the whole model, rename it to \
             model.safetensors",
        )
    } else if let Some(pickle) = first_with(&[".bin", ".pt", ".pth", ".bin.index.json"]) {
        (
            format!("`{}`", shown(pickle)),
            "only safetensors is read, because pickle files can run code; convert once with transformers: \
             `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)`",
        )
    } else if let Some(gguf) = first_with(&[".gguf"]) {
        (format!("`{}`", shown(gguf)), "GGUF is not read; use the safetensors release of the model")
    } else {
        let sample = names.iter().take(4).map(|n| shown(n)).collect::<Vec<_>>().join(", ");
        (format!("{} other entries ({sample})", names.len()), "download the model's .safetensors files")
    };
    WeightsError::NoCheckpoint { dir: dir.to_owned(), found, remedy }
}
