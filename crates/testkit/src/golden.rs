//! Reference outputs: what transformers computes in float64 for the small random checkpoints in
//! `tests/fixtures/goldens` (for `dense-dca*` the attention is the dual chunk reference).

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// Directory of the golden cases, each with `config.json`, `model.safetensors` and `golden.safetensors`: that of the
/// repository, or `LONGHAUL_TEST_GOLDENS` for a test program that was carried to another machine.
pub fn goldens_dir() -> PathBuf {
    let of_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/goldens");
    std::env::var_os("LONGHAUL_TEST_GOLDENS").map_or_else(of_repository, PathBuf::from)
}

/// The golden cases, sorted by name; [`Golden::load`] takes each.
///
/// # Panics
/// When there are none: a test that loops over no case proves nothing.
pub fn golden_cases() -> Vec<PathBuf> {
    let dir = goldens_dir();
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut cases: Vec<PathBuf> = entries
        .map(|e| e.unwrap_or_else(|e| panic!("{}: {e}", dir.display())).path())
        .filter(|path| path.join("golden.safetensors").is_file())
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "{}: no golden cases", dir.display());
    cases
}

/// One case's inputs and reference outputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Golden {
    /// Name of the case: its directory.
    pub name: String,
    /// Directory with config.json and model.safetensors.
    pub dir: PathBuf,
    /// The prompt.
    pub input_ids: Vec<u32>,
    /// The greedy continuation of the prompt.
    pub greedy: Vec<u32>,
    /// Logits after every prompt token, `[input_ids.len(), vocab]`, row-major.
    pub logits: Vec<f32>,
    /// Columns of `logits`.
    pub vocab: usize,
}

impl Golden {
    /// Reads `golden.safetensors` in `dir`.
    ///
    /// # Panics
    /// When the file is missing or not as documented, with the path.
    pub fn load(dir: &Path) -> Self {
        let path = dir.join("golden.safetensors");
        let fail = |what: &str| -> ! { panic!("{}: {what}", path.display()) };
        let bytes = std::fs::read(&path).unwrap_or_else(|e| fail(&e.to_string()));
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| fail(&e.to_string()));
        let tensor = |name: &str, dtype: Dtype| -> TensorView<'_> {
            let view = file.tensor(name).unwrap_or_else(|e| fail(&e.to_string()));
            if view.dtype() != dtype {
                fail(&format!("{name}: found {}, expected {dtype}", view.dtype()));
            }
            view
        };
        let ids = |name: &str| -> Vec<u32> {
            let view = tensor(name, Dtype::I64);
            let (chunks, _) = view.data().as_chunks::<8>();
            let id = |chunk: &[u8; 8]| u32::try_from(i64::from_le_bytes(*chunk));
            chunks.iter().map(|c| id(c).unwrap_or_else(|_| fail(&format!("{name}: not an id")))).collect()
        };
        let view = tensor("logits", Dtype::F32);
        let (chunks, _) = view.data().as_chunks::<4>();
        let logits: Vec<f32> = chunks.iter().map(|c| f32::from_le_bytes(*c)).collect();
        let input_ids = ids("input_ids");
        let &[rows, vocab] = view.shape() else { fail("logits: not a matrix") };
        if rows != input_ids.len() {
            fail(&format!("logits: {rows} rows for {} ids", input_ids.len()));
        }
        let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Self { name, dir: dir.to_owned(), input_ids, greedy: ids("greedy"), logits, vocab }
    }

    /// The reference logits after prompt token `index`, `[vocab]`.
    pub fn logits_after(&self, index: usize) -> &[f32] {
        &self.logits[index * self.vocab..(index + 1) * self.vocab]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_whole_and_its_first_greedy_token_follows_from_its_logits() {
        for dir in golden_cases() {
            let golden = Golden::load(&dir);
            let last = golden.logits_after(golden.input_ids.len() - 1);
            let best = (0..golden.vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            assert_eq!(golden.greedy[0] as usize, best, "{}", golden.name);
            assert!(golden.logits.iter().all(|v| v.is_finite()), "{}", golden.name);
            assert!(
                golden.dir.join("config.json").is_file() && golden.dir.join("model.safetensors").is_file()
            );
        }
    }
}
