//! Drawing tokens (`cuda/sampling/`): one upload of parameters, two launches (three where a row draws), one small download.

use bytemuck::{Pod, Zeroable};
use longhaul_backend::{Draw, Error, RowError, Sampled, SamplingRow, uniform};

use crate::CudaError;
use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::ops::sampling_slice;
use crate::tensor::Tensor;

pub(super) const OP: &str = "sample";

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SampleRow {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    uniform: f32,
    lists: u32,
    mask: u32,
}

#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct SampleResult {
    id: u32,
    logprob: f32,
    status: u32,
    reserved: u32,
}

/// What a chunk of a row contributes.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct SamplePartial {
    /// Of the raw logits.
    pub(super) largest: f32,
    /// Of `exp(logit - largest)`.
    pub(super) sum: f32,
    /// [`longhaul_backend::order_key`] of the best score.
    pub(super) best_key: u32,
    /// Its lowest id, counted from the first of the slice.
    pub(super) best_id: u32,
    pub(super) finite: u32,
    changed: u32,
    pub(super) best_logit: f32,
}

/// `SampleStatus` of `cuda/sampling/sample.h`.
const NOT_FINITE: u32 = 0;
const NOTHING_ALLOWED: u32 = 2;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct SampleParams {
    logits: DevicePtr,
    scores: DevicePtr,
    rows: DevicePtr,
    partials: DevicePtr,
    histograms: DevicePtr,
    candidates: DevicePtr,
    results: DevicePtr,
    /// The largest scores of all slices; null where the logits are whole rows.
    pub(super) largest: DevicePtr,
    vocab: u32,
    stride: u32,
    most_candidates: u32,
    first_id: u32,
}

const SCORES: Kernel<SampleParams> = Kernel::new("sample_scores");
const HISTOGRAM: Kernel<SampleParams> = Kernel::new("sample_histogram");
const ROWS: Kernel<SampleParams> = Kernel::new("sample_rows");
const CHUNK_THREADS: u32 = 256;
const ROW_THREADS: u32 = 512;

/// Logits of a block of the kernels that read them all. A constant, so that sums do not depend on the batch.
const CHUNK: usize = 2048;
/// Words of `SamplePartial`.
const PARTIAL_WORDS: usize = size_of::<SamplePartial>() / 4;
/// Bytes of `SampleHistogram`: count and mass of 2048 bins, and the totals.
pub(super) const HISTOGRAM_BYTES: usize = 2048 * 12 + 32;
/// Where [`SampleHistogram`](HISTOGRAM_BYTES) has the total mass and, behind it, the mass above min-p.
pub(super) const HISTOGRAM_TOTALS: usize = 2048 * 8;
/// Most candidates of a row, 8 bytes each.
const MOST_CANDIDATES: usize = 32 << 10;

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[SCORES.info(), HISTOGRAM.info(), ROWS.info()];

/// Bytes of the arena that drawing `rows` tokens of `vocab` takes, parameters excluded.
pub(crate) fn scratch_bytes(rows: usize, vocab: usize) -> usize {
    let partials = vocab.div_ceil(CHUNK) * PARTIAL_WORDS * 4;
    let row = vocab.next_multiple_of(4) * 4 + partials + HISTOGRAM_BYTES + 8 * most_candidates(vocab);
    rows * (row + sampling_slice::WINDOW_BYTES)
}

fn most_candidates(vocab: usize) -> usize {
    vocab.next_multiple_of(2).min(MOST_CANDIDATES)
}

/// Rows on the device while their tokens are drawn.
pub(super) struct Batch {
    pub(super) params: SampleParams,
    pub(super) chunks: usize,
    /// Whether any row draws.
    pub(super) draws: bool,
    rows: usize,
    partials: Tensor,
    results: Tensor,
    /// Others that the parameters point to.
    _tensors: Vec<Tensor>,
}

impl Batch {
    /// Uploads `rows`; `logits` are those of the ids from `first_id` on. Takes its memory from the arena.
    pub(super) fn new(
        ctx: &Context,
        logits: &Tensor,
        first_id: usize,
        rows: &[SamplingRow<'_>],
    ) -> Result<Self, Error> {
        let vocab = logits.cols;
        let chunks = vocab.div_ceil(CHUNK);
        let Packed { words, changes, draws } = pack(rows, first_id, vocab);
        let parameters = ctx.tensor(OP, 1, words.len(), Element::U32)?;
        ctx.driver.upload(parameters.address(), bytemuck::cast_slice(&words))?;
        let results = ctx.tensor(OP, rows.len(), size_of::<SampleResult>() / 4, Element::U32)?;
        let partials = ctx.tensor(OP, 1, rows.len() * chunks * PARTIAL_WORDS, Element::U32)?;
        // Scores that differ from their logits.
        let scores = changes.then(|| ctx.tensor(OP, rows.len(), vocab, Element::F32)).transpose()?;
        let most_candidates = most_candidates(vocab);
        let scratch =
            |words: usize| draws.then(|| ctx.tensor(OP, 1, rows.len() * words, Element::U32)).transpose();
        let histograms = scratch(HISTOGRAM_BYTES / 4)?;
        let candidates = scratch(2 * most_candidates)?;
        let params = SampleParams {
            logits: logits.address(),
            scores: Context::optional(scores.as_ref()),
            rows: parameters.address(),
            partials: partials.address(),
            histograms: Context::optional(histograms.as_ref()),
            candidates: Context::optional(candidates.as_ref()),
            results: results.address(),
            largest: DevicePtr::NULL,
            vocab: vocab as u32,
            stride: logits.stride as u32,
            most_candidates: most_candidates as u32,
            first_id: first_id as u32,
        };
        let tensors = [Some(parameters), scores, histograms, candidates].into_iter().flatten().collect();
        Ok(Self { params, chunks, draws, rows: rows.len(), partials, results, _tensors: tensors })
    }

    fn by_chunk(&self) -> Geometry {
        Geometry::grid([self.chunks as u32, self.rows as u32, 1], CHUNK_THREADS)
    }

    /// The pass over the logits.
    pub(super) fn score(&self, ctx: &Context) -> crate::Result<()> {
        ctx.launch(&SCORES, self.by_chunk(), self.params)
    }

    /// The pass over the scores of rows that draw.
    pub(super) fn histogram(&self, ctx: &Context) -> crate::Result<()> {
        ctx.launch(&HISTOGRAM, self.by_chunk(), self.params)
    }

    /// What [`Batch::score`] found, chunk by chunk of every row.
    pub(super) fn partials(&self, ctx: &Context) -> crate::Result<Vec<SamplePartial>> {
        let mut partials = vec![SamplePartial::default(); self.rows * self.chunks];
        ctx.driver.download(self.partials.address(), bytemuck::cast_slice_mut(&mut partials))?;
        Ok(partials)
    }

    /// Total mass and mass above min-p of a row that draws, as [`Batch::histogram`] found them.
    pub(super) fn totals(&self, ctx: &Context, row: usize) -> crate::Result<[u64; 2]> {
        let mut totals = [0u64; 2];
        let address = self.params.histograms.offset(row * HISTOGRAM_BYTES + HISTOGRAM_TOTALS);
        ctx.driver.download(address, bytemuck::cast_slice_mut(&mut totals))?;
        Ok(totals)
    }
}

/// Draws one token for each row of `logits` (f32 `[rows, vocab]`); see [`SamplingRow`] for the order of the rules.
///
/// # Errors
/// Those of [`SamplingRow::check`]; shapes that do not fit; no room in the arena.
pub fn sample(ctx: &Context, logits: &Tensor, rows: &[SamplingRow<'_>]) -> Result<Vec<Draw>, Error> {
    check(logits, rows)?;
    if logits.cols == 0 {
        return Err(Error::shape(OP, "a vocabulary of no ids"));
    }
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let vocab = logits.cols;
    for (index, row) in rows.iter().enumerate() {
        row.check(vocab, index)?;
    }
    let batch = Batch::new(ctx, logits, 0, rows)?;
    batch.score(ctx)?;
    if batch.draws {
        batch.histogram(ctx)?;
    }
    ctx.launch(&ROWS, Geometry::linear(rows.len(), ROW_THREADS), batch.params)?;
    let mut out = vec![SampleResult::default(); rows.len()];
    ctx.driver.download(batch.results.address(), bytemuck::cast_slice_mut(&mut out))?;
    out.iter()
        .enumerate()
        .map(|(row, result)| match result.status {
            NOT_FINITE => Ok(Err(RowError::NotFinite)),
            NOTHING_ALLOWED => Ok(Err(RowError::NothingAllowed)),
            _ if result.id as usize >= vocab => Err(CudaError::Call {
                call: OP.into(),
                message: format!("row {row} drew id {} of {vocab}", result.id),
            }
            .into()),
            _ => Ok(Ok(Sampled { id: result.id, logprob: result.logprob })),
        })
        .collect()
}

/// Whether `logits` are f32 with one row for each of `rows`.
pub(super) fn check(logits: &Tensor, rows: &[SamplingRow<'_>]) -> Result<(), Error> {
    if logits.rows == rows.len() && logits.element == Element::F32 {
        return Ok(());
    }
    let (element, shape) = (logits.element, [logits.rows, logits.cols]);
    Err(Error::shape(OP, format!("{element:?} logits {shape:?}, {} rows of parameters", rows.len())))
}

/// What is uploaded for a draw.
struct Packed {
    /// Parameters of all rows, then their lists by chunk, and masks.
    words: Vec<u32>,
    /// Whether the scores of any row differ from its logits.
    changes: bool,
    /// Whether any row draws.
    draws: bool,
}

/// The rows as kernels read them: ids count from `first_id`, and those outside its `vocab` ids are left out.
fn pack(rows: &[SamplingRow<'_>], first_id: usize, vocab: usize) -> Packed {
    const ROW_WORDS: usize = size_of::<SampleRow>() / 4;
    let mut words = vec![0u32; rows.len() * ROW_WORDS];
    for (index, row) in rows.iter().enumerate() {
        // Ids before the first become larger than any.
        let local = |id: u32| id.checked_sub(first_id as u32).unwrap_or(u32::MAX);
        let seen: Vec<[u32; 2]> = row
            .seen
            .iter()
            .map(|seen| (seen.id, row.penalty(seen)))
            .filter(|(_, penalty)| row.repetition_penalty != 1.0 || *penalty != 0.0)
            .map(|(id, penalty)| [local(id), penalty.to_bits()])
            .collect();
        let bias: Vec<[u32; 2]> = row.bias.iter().map(|(id, bias)| [local(*id), bias.to_bits()]).collect();
        let banned: Vec<[u32; 1]> = row.banned.iter().map(|id| [local(*id)]).collect();
        let mut lists = 0;
        if !(seen.is_empty() && bias.is_empty() && banned.is_empty()) {
            lists = words.len();
            let starts = vocab.div_ceil(CHUNK) + 1;
            words.resize(lists + 3 * starts, 0);
            push_by_chunk(&mut words, lists, &seen, vocab);
            push_by_chunk(&mut words, lists + starts, &bias, vocab);
            push_by_chunk(&mut words, lists + 2 * starts, &banned, vocab);
        }
        let mut mask = 0;
        if let Some(allowed) = row.allowed {
            mask = words.len();
            let word = |at: usize| allowed.get(at).copied().unwrap_or(0);
            let (skipped, shift) = (first_id / 32, first_id as u32 % 32);
            // Two words, of which the first id's bit becomes the lowest.
            let pair = |at: usize| u64::from(word(at)) | u64::from(word(at + 1)) << 32;
            words.extend((0..vocab.div_ceil(32)).map(|at| (pair(skipped + at) >> shift) as u32));
        }
        let packed = SampleRow {
            temperature: row.temperature,
            top_k: row.top_k,
            top_p: row.top_p,
            min_p: row.min_p,
            repetition_penalty: row.repetition_penalty,
            uniform: uniform(row.seed, row.position),
            lists: lists as u32,
            mask: mask as u32,
        };
        words[index * ROW_WORDS..][..ROW_WORDS].copy_from_slice(bytemuck::cast_slice(&[packed]));
    }
    let changes =
        words[..rows.len() * ROW_WORDS].chunks_exact(ROW_WORDS).any(|row| row[6] != 0 || row[7] != 0);
    Packed { words, changes, draws: rows.iter().any(|row| row.temperature > 0.0) }
}

/// Appends `entries` (their first word is an id below `vocab`, others are left out) ordered by chunk; where each chunk
/// starts, and where the last ends, goes to `words[starts..]`. A counting sort, since lists can be as long as a prompt.
fn push_by_chunk<const N: usize>(words: &mut Vec<u32>, starts: usize, entries: &[[u32; N]], vocab: usize) {
    let chunks = vocab.div_ceil(CHUNK);
    let chunk = |entry: &[u32; N]| {
        let id = entry.first().map_or(usize::MAX, |id| *id as usize);
        (id < vocab).then_some(id / CHUNK)
    };
    let mut next = vec![0usize; chunks + 1];
    for chunk in entries.iter().filter_map(chunk) {
        next[chunk + 1] += N;
    }
    let mut total = words.len();
    for (index, count) in next.iter_mut().enumerate() {
        total += *count;
        *count = total;
        words[starts + index] = total as u32;
    }
    words.resize(total, 0);
    for entry in entries {
        if let Some(chunk) = chunk(entry) {
            words[next[chunk]..][..N].copy_from_slice(entry);
            next[chunk] += N;
        }
    }
}
