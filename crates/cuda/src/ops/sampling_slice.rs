//! A rank's slice of the vocabulary on its device (`cuda/sampling/`): the passes of a whole vocabulary, and kernels that tell
//! what lies in a window of the order from likely to unlikely.

use bytemuck::{Pod, Zeroable};
use longhaul_backend::{
    Candidate, Error, Largest, MOST_MEMBERS, PARTS, Part, SamplingRow, SliceMasses, SliceSummary,
    VocabularySlice, Window,
};

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::ops::sampling::{Batch, OP, SampleParams, SamplePartial, check};
use crate::tensor::Tensor;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SampleWindow {
    first: u64,
    last: u64,
    row: u32,
    shift: u32,
}

#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct SamplePart {
    mass: u64,
    count: u32,
    reserved: u32,
}

#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct SampleMember {
    place: u64,
    mass: u64,
    logit: f32,
    reserved: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SampleWindowParams {
    sample: SampleParams,
    windows: DevicePtr,
    parts: DevicePtr,
    members: DevicePtr,
    counts: DevicePtr,
}

const PARTS_KERNEL: Kernel<SampleWindowParams> = Kernel::new("sample_parts");
const MEMBERS_KERNEL: Kernel<SampleWindowParams> = Kernel::new("sample_members");
const THREADS: u32 = 256;

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[PARTS_KERNEL.info(), MEMBERS_KERNEL.info()];

/// `kMassUnit` of `cuda/sampling/sample.h`.
const UNIT: u64 = 1 << 40;

const PARTS_BYTES: usize = PARTS * size_of::<SamplePart>();
const MEMBERS_BYTES: usize = MOST_MEMBERS * size_of::<SampleMember>();

/// Bytes of the arena for the windows of a row: parts, members and their count, the window, the largest score.
pub(crate) const WINDOW_BYTES: usize = PARTS_BYTES + MEMBERS_BYTES + 4 + size_of::<SampleWindow>() + 4;

/// The ids `first_id..first_id + logits.cols` of a batch of rows, for [`longhaul_backend::sample_slices`]. A row's masses are
/// those of [`sample`](super::sampling::sample), so it draws the same token over any number of ranks.
pub struct Slice<'a> {
    ctx: &'a Context,
    rows: &'a [SamplingRow<'a>],
    first_id: usize,
    /// `None` where the slice or the batch is empty.
    device: Option<OnDevice>,
}

struct OnDevice {
    batch: Batch,
    partials: Vec<SamplePartial>,
    largest: Tensor,
    windows: Tensor,
    parts: Tensor,
    members: Tensor,
    counts: Tensor,
}

impl<'a> Slice<'a> {
    /// Uploads the rows; their lists are checked before anything is asked ([`SamplingRow::check`]).
    ///
    /// # Errors
    /// Shapes that do not fit; no room in the arena.
    pub fn new(
        ctx: &'a Context,
        logits: &Tensor,
        first_id: usize,
        rows: &'a [SamplingRow<'a>],
    ) -> Result<Self, Error> {
        check(logits, rows)?;
        let tensor = |bytes: usize| ctx.tensor(OP, 1, rows.len() * bytes / 4, Element::U32);
        let device = if logits.cols == 0 || rows.is_empty() {
            None
        } else {
            Some(OnDevice {
                batch: Batch::new(ctx, logits, first_id, rows)?,
                partials: Vec::new(),
                largest: tensor(4)?,
                windows: tensor(size_of::<SampleWindow>())?,
                parts: tensor(PARTS_BYTES)?,
                members: tensor(MEMBERS_BYTES)?,
                counts: tensor(4)?,
            })
        };
        Ok(Self { ctx, rows, first_id, device })
    }

    /// Every row that draws: up to `wanted` of its best candidates, and from where on some are left out.
    fn best(
        &mut self,
        masses: &mut [SliceMasses],
        largest: &[Largest],
        wanted: &[usize],
    ) -> Result<(), Error> {
        let near = |(row, (parameters, largest)): (usize, (&SamplingRow<'_>, &Largest))| {
            let draws = parameters.temperature > 0.0;
            draws.then(|| Window::near(row, largest.score, parameters.temperature))
        };
        let mut windows: Vec<Window> = self.rows.iter().zip(largest).enumerate().filter_map(near).collect();
        let parts = self.parts(&windows)?;
        for (window, parts) in windows.iter_mut().zip(parts) {
            let (Some(masses), Some(&wanted)) = (masses.get_mut(window.row), wanted.get(window.row)) else {
                continue;
            };
            // As many parts as hold what is wanted, and no more than a list takes.
            let (mut count, mut mass, mut kept) = (0, 0, 0);
            for part in &parts {
                let next = count + part.count as usize;
                if count >= wanted || next > MOST_MEMBERS {
                    break;
                }
                (count, mass, kept) = (next, mass + part.mass, kept + 1);
            }
            masses.beyond = match kept {
                _ if mass == masses.total => u64::MAX,
                0 => window.first,
                kept => window.part(kept - 1).last.saturating_add(1),
            };
            // An empty window has its last place before its first.
            window.last = if kept == 0 { window.first - 1 } else { window.part(kept - 1).last };
        }
        windows.retain(|window| window.last >= window.first);
        for (window, mut members) in windows.iter().zip(self.members(&windows)?) {
            let (Some(masses), Some(&wanted)) = (masses.get_mut(window.row), wanted.get(window.row)) else {
                continue;
            };
            members.sort_unstable_by_key(|candidate| candidate.place);
            if members.len() > wanted {
                members.truncate(wanted);
                masses.beyond = members.last().map_or(window.first, |last| last.place + 1);
            }
            masses.best = members;
        }
        Ok(())
    }
}

impl OnDevice {
    /// Uploads `windows`, at most one a row, and launches `kernel` over them.
    fn launch(
        &self,
        ctx: &Context,
        kernel: &Kernel<SampleWindowParams>,
        windows: &[Window],
    ) -> crate::Result<()> {
        let packed: Vec<SampleWindow> = windows
            .iter()
            .map(|w| SampleWindow { first: w.first, last: w.last, row: w.row as u32, shift: w.shift() })
            .collect();
        ctx.driver.upload(self.windows.address(), bytemuck::cast_slice(&packed))?;
        let params = SampleWindowParams {
            sample: self.batch.params,
            windows: self.windows.address(),
            parts: self.parts.address(),
            members: self.members.address(),
            counts: self.counts.address(),
        };
        let grid = [self.batch.chunks as u32, windows.len() as u32, 1];
        ctx.launch(kernel, Geometry::grid(grid, THREADS), params)
    }
}

impl VocabularySlice for Slice<'_> {
    fn unit(&self) -> u64 {
        UNIT
    }

    fn summaries(&mut self) -> Result<Vec<SliceSummary>, Error> {
        let Some(device) = &mut self.device else {
            return Ok(vec![SliceSummary::default(); self.rows.len()]);
        };
        device.batch.score(self.ctx)?;
        device.partials = device.batch.partials(self.ctx)?;
        let summary = |chunks: &[SamplePartial]| {
            chunks.iter().fold(SliceSummary::default(), |whole, chunk| {
                let id = self.first_id as u64 + u64::from(chunk.best_id);
                let best = u64::from(chunk.best_key) << 32 | id;
                let is_better = best < whole.best;
                SliceSummary {
                    finite: whole.finite && chunk.finite != 0,
                    largest: whole.largest.max(chunk.largest),
                    best: if is_better { best } else { whole.best },
                    logit: if is_better { chunk.best_logit } else { whole.logit },
                }
            })
        };
        Ok(device.partials.chunks_exact(device.batch.chunks).map(summary).collect())
    }

    fn masses(&mut self, largest: &[Largest], wanted: &[usize]) -> Result<Vec<SliceMasses>, Error> {
        let mut masses = vec![SliceMasses::default(); self.rows.len()];
        let Some(device) = &mut self.device else {
            return Ok(masses);
        };
        let chunks = device.partials.chunks_exact(device.batch.chunks);
        for ((masses, largest), chunks) in masses.iter_mut().zip(largest).zip(chunks) {
            let weight =
                |chunk: &SamplePartial| f64::from(chunk.sum) * f64::from(chunk.largest - largest.logit).exp();
            masses.raw = (chunks.iter().map(weight).sum::<f64>() * UNIT as f64) as u64;
        }
        if !device.batch.draws {
            return Ok(masses);
        }
        let scores: Vec<f32> = largest.iter().map(|largest| largest.score).collect();
        self.ctx.driver.upload(device.largest.address(), bytemuck::cast_slice(&scores))?;
        device.batch.params.largest = device.largest.address();
        device.batch.histogram(self.ctx)?;
        for (row, (masses, parameters)) in masses.iter_mut().zip(self.rows).enumerate() {
            if parameters.temperature > 0.0 {
                [masses.total, masses.above_min_p] = device.batch.totals(self.ctx, row)?;
            }
        }
        self.best(&mut masses, largest, wanted)?;
        Ok(masses)
    }

    fn parts(&mut self, windows: &[Window]) -> Result<Vec<Vec<Part>>, Error> {
        let Some(device) = &self.device else {
            return Ok(vec![vec![Part::default(); PARTS]; windows.len()]);
        };
        if windows.is_empty() {
            return Ok(Vec::new());
        }
        let mut out = vec![SamplePart::default(); windows.len() * PARTS];
        self.ctx.driver.fill(device.parts.address(), 0, windows.len() * PARTS_BYTES)?;
        device.launch(self.ctx, &PARTS_KERNEL, windows)?;
        self.ctx.driver.download(device.parts.address(), bytemuck::cast_slice_mut(&mut out))?;
        let part = |part: &SamplePart| Part { count: part.count, mass: part.mass };
        Ok(out.chunks_exact(PARTS).map(|parts| parts.iter().map(part).collect()).collect())
    }

    fn members(&mut self, windows: &[Window]) -> Result<Vec<Vec<Candidate>>, Error> {
        let Some(device) = &self.device else {
            return Ok(vec![Vec::new(); windows.len()]);
        };
        if windows.is_empty() {
            return Ok(Vec::new());
        }
        let mut counts = vec![0u32; windows.len()];
        self.ctx.driver.fill(device.counts.address(), 0, windows.len() * 4)?;
        device.launch(self.ctx, &MEMBERS_KERNEL, windows)?;
        self.ctx.driver.download(device.counts.address(), bytemuck::cast_slice_mut(&mut counts))?;
        let list = |(index, count): (usize, u32)| {
            if count as usize > MOST_MEMBERS {
                let detail = format!("{count} candidates in a window, at most {MOST_MEMBERS} can be listed");
                return Err(Error::shape(OP, detail));
            }
            let mut members = vec![SampleMember::default(); count as usize];
            if count > 0 {
                let address = device.members.address().offset(index * MEMBERS_BYTES);
                self.ctx.driver.download(address, bytemuck::cast_slice_mut(&mut members))?;
            }
            let candidate = |m: &SampleMember| Candidate { place: m.place, mass: m.mass, logit: m.logit };
            Ok(members.iter().map(candidate).collect())
        };
        counts.into_iter().enumerate().map(list).collect()
    }
}
