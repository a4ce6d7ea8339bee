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
    /// By how much each row's last chosen expert is more probable than the first one left out, least over the layers
    /// (`p_k / p_(k + 1) - 1`, in float64 by `tests/fixtures/router_margins.py`); infinite without experts.
    pub router_margins: Vec<f32>,
}

/// Router margin below which rounding activations to bf16 can choose another expert, which is then another model's logits.
const ROUTER_TIE: f32 = 0.03;
/// Limit on rows below [`ROUTER_TIE`]: an expert of equal weight was exchanged, nothing worse.
const ROUTER_TIE_LIMIT: f32 = 0.2;

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
        let router_margins = match std::fs::read(dir.join("router_margins.json")) {
            Ok(json) => {
                serde_json::from_slice(&json).unwrap_or_else(|e| fail(&format!("router_margins.json: {e}")))
            }
            Err(_) => vec![f32::INFINITY; rows],
        };
        if router_margins.len() != rows {
            fail(&format!("router_margins.json: {} margins for {rows} rows", router_margins.len()));
        }
        Self { name, dir: dir.to_owned(), input_ids, greedy: ids("greedy"), logits, vocab, router_margins }
    }

    /// Fails unless logits of bf16 activations lie within `limit` of the reference, relative to its largest logit. Rows
    /// whose router all but ties are held to a wider limit: rounding decides which expert they visit.
    ///
    /// # Panics
    /// With the worst row.
    pub fn assert_close_in_bf16(&self, name: &str, actual: &[f32], limit: f32) {
        assert_eq!(actual.len(), self.logits.len(), "{name}: count of logits");
        let largest = self.logits.iter().fold(0f32, |m, v| m.max(v.abs()));
        let rows = actual.chunks_exact(self.vocab).zip(self.logits.chunks_exact(self.vocab));
        for (row, ((actual, expected), &margin)) in rows.zip(&self.router_margins).enumerate() {
            let error = actual.iter().zip(expected).map(|(a, e)| (a - e).abs());
            // A NaN is the worst error, and stays it.
            let error = error.fold(0f32, |m, e| if m.is_nan() || e <= m { m } else { e }) / largest;
            let limit = if margin < ROUTER_TIE { limit.max(ROUTER_TIE_LIMIT) } else { limit };
            assert!(
                error <= limit,
                "{name}: row {row}, router margin {margin}: {error:.3e} exceeds {limit:.1e}"
            );
        }
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
    fn a_wrong_row_is_found_and_a_tie_is_not_an_excuse_for_nan() {
        let mut golden = Golden::load(&goldens_dir().join("moe-shared"));
        let ties = golden.router_margins.iter().filter(|&&m| m < ROUTER_TIE).count();
        assert!(ties > 0 && 4 * ties < golden.input_ids.len(), "{ties} ties");
        let right = golden.logits.clone();
        golden.assert_close_in_bf16("right", &right, 1e-6);
        let largest = right.iter().fold(0f32, |m, v| m.max(v.abs()));
        let refused = |golden: &Golden, row: usize, by: f32| {
            let mut wrong = right.clone();
            wrong[row * golden.vocab] += by * largest;
            std::panic::catch_unwind(|| golden.assert_close_in_bf16("wrong", &wrong, 4e-2)).is_err()
        };
        golden.router_margins[0] = 1.0;
        golden.router_margins[1] = 0.0;
        assert!(refused(&golden, 0, 0.05) && refused(&golden, 1, 0.25) && refused(&golden, 1, f32::NAN));
        assert!(!refused(&golden, 0, 0.03) && !refused(&golden, 1, 0.1));
    }

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
