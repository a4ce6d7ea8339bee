//! Drawing tokens (`cuda/sampling/sample.cu`): one upload of parameters, one launch, one small download.

use bytemuck::{Pod, Zeroable};
use longhaul_backend::{Error, Sampled, SamplingRow, uniform};

use crate::CudaError;
use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::tensor::Tensor;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SampleRow {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    uniform: f32,
    seen: u32,
    seen_count: u32,
    banned: u32,
    banned_count: u32,
}

#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct SampleResult {
    id: u32,
    logprob: f32,
    finite: u32,
    reserved: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SampleParams {
    logits: DevicePtr,
    scores: DevicePtr,
    rows: DevicePtr,
    results: DevicePtr,
    vocab: u32,
    stride: u32,
}

const SAMPLE: Kernel<SampleParams> = Kernel::new("sample_rows");
const THREADS: u32 = 1024;

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[SAMPLE.info()];

/// Draws one token for each row of `logits` (f32 `[rows, vocab]`); see [`SamplingRow`] for the order of the rules.
///
/// # Errors
/// [`Error::NotFinite`] for the first row with a NaN or infinite logit; shapes that do not fit; no room in the arena.
pub fn sample(ctx: &Context, logits: &Tensor, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>, Error> {
    const OP: &str = "sample";
    if logits.rows != rows.len() || logits.element != Element::F32 || logits.cols == 0 {
        return Err(Error::shape(
            OP,
            format!(
                "{:?} logits [{}, {}], {} rows of parameters",
                logits.element,
                logits.rows,
                logits.cols,
                rows.len()
            ),
        ));
    }
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let (words, changes) = pack(rows);
    let parameters = ctx.tensor(OP, 1, words.len(), Element::U32)?;
    ctx.driver.upload(parameters.address(), bytemuck::cast_slice(&words))?;
    let results = ctx.tensor(OP, rows.len(), size_of::<SampleResult>() / 4, Element::U32)?;
    // Rows whose scores differ from their logits work on a copy.
    let scores = changes.then(|| ctx.tensor(OP, logits.rows, logits.cols, Element::F32)).transpose()?;
    let params = SampleParams {
        logits: logits.address(),
        scores: Context::optional(scores.as_ref()),
        rows: parameters.address(),
        results: results.address(),
        vocab: logits.cols as u32,
        stride: logits.stride as u32,
    };
    ctx.launch(&SAMPLE, Geometry::linear(rows.len(), THREADS), params)?;
    let mut out = vec![SampleResult::default(); rows.len()];
    ctx.driver.download(results.address(), bytemuck::cast_slice_mut(&mut out))?;
    out.iter()
        .enumerate()
        .map(|(row, result)| match result.finite {
            0 => Err(Error::NotFinite { row }),
            _ if result.id as usize >= logits.cols => Err(CudaError::Call {
                call: OP.into(),
                message: format!("row {row} drew id {} of {}", result.id, logits.cols),
            }
            .into()),
            _ => Ok(Sampled { id: result.id, logprob: result.logprob }),
        })
        .collect()
}

/// Parameters of all rows, then their lists of ids; and whether any row changes its scores.
fn pack(rows: &[SamplingRow<'_>]) -> (Vec<u32>, bool) {
    const ROW_WORDS: usize = size_of::<SampleRow>() / 4;
    let mut words = vec![0u32; rows.len() * ROW_WORDS];
    let mut changes = false;
    for (index, row) in rows.iter().enumerate() {
        let seen = words.len() as u32;
        words.extend(row.seen.iter().flat_map(|s| [s.id, s.generated]));
        let banned = words.len() as u32;
        words.extend(row.banned);
        changes |= !row.seen.is_empty() || !row.banned.is_empty();
        let packed = SampleRow {
            temperature: row.temperature,
            top_k: row.top_k,
            top_p: row.top_p,
            min_p: row.min_p,
            repetition_penalty: row.repetition_penalty,
            presence_penalty: row.presence_penalty,
            frequency_penalty: row.frequency_penalty,
            uniform: uniform(row.seed, row.position),
            seen,
            seen_count: row.seen.len() as u32,
            banned,
            banned_count: row.banned.len() as u32,
        };
        words[index * ROW_WORDS..][..ROW_WORDS].copy_from_slice(bytemuck::cast_slice(&[packed]));
    }
    (words, changes)
}
