//! A model on a device behind one object-safe seam, so that the engine is not generic over devices.

use std::sync::Arc;

use longhaul_backend::{Backend, Draw, KvLayout, OwnedSamplingRow, Sampled, SamplingRow, StepInputs};
use longhaul_cpu::{Cpu, KvCache};
use longhaul_model::Model;

use crate::Result;

/// Runs steps. Logits stay on the device unless they are asked for.
pub(crate) trait Runner: Send {
    /// Runs a step and draws a token for each of `rows`: one a logit row, or none at all.
    fn run(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>], logits: WholeLogits) -> Result<Outcome>;

    /// Changes whole blocks before the next step.
    fn change_blocks(&mut self, changes: &BlockChanges) -> Result<()>;

    /// Runs a step whose rows all have to draw a token.
    fn sample(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>> {
        let draws = self.run(inputs, rows, WholeLogits::Stay)?.draws;
        let all: std::result::Result<_, longhaul_backend::RowError> = draws.into_iter().collect();
        Ok(all.map_err(longhaul_backend::Error::from)?)
    }

    /// Runs a step and returns the logits `[logit_rows, vocab]` of the rows that want them.
    fn logits(&mut self, inputs: StepInputs) -> Result<Vec<f32>> {
        Ok(self.run(inputs, &[], WholeLogits::ToHost)?.logits)
    }

    /// Most rows of a step.
    fn max_rows(&self) -> usize {
        usize::MAX
    }

    /// Most sequences of a step.
    fn max_sequences(&self) -> usize {
        usize::MAX
    }

    /// Prompt tokens of a prefill step when the request does not say: enough rows for full matrix speed, few enough that a
    /// step's temporaries stay small.
    fn default_chunk(&self) -> usize {
        512
    }

    /// Whether steps read the host's memory.
    fn is_on_host(&self) -> bool {
        true
    }

    /// Most rows of a step whose logits may be wanted.
    fn max_logit_rows(&self) -> usize {
        usize::MAX
    }
}

/// What to do with the logits beside drawing from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WholeLogits {
    /// Nothing: they stay on their ranks.
    Stay,
    /// Bring them to the host whole.
    ToHost,
}

/// What a step yields.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// One for each row that was to draw.
    pub draws: Vec<Draw>,
    /// `[logit_rows, vocab]` with [`WholeLogits::ToHost`], else empty.
    pub logits: Vec<f32>,
}

/// What every rank does with its logits: draws for `rows`, if there are any, and gathers them where they are wanted whole.
pub(crate) fn use_logits<B: Backend>(
    model: &Model<B>,
    logits: B::Tensor,
    rows: &[SamplingRow<'_>],
    whole: WholeLogits,
) -> Result<(Vec<Draw>, Option<B::Tensor>)> {
    let draws = if rows.is_empty() { Vec::new() } else { model.sample(&logits, rows)? };
    let whole = match whole {
        WholeLogits::Stay => None,
        WholeLogits::ToHost => Some(model.gather_logits(logits)?),
    };
    Ok((draws, whole))
}

/// Whole blocks to change, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BlockChanges {
    /// Blocks to fill with zeros.
    pub zero: Vec<u32>,
    /// Blocks to copy, from and to.
    pub copies: Vec<(u32, u32)>,
}

impl BlockChanges {
    pub(crate) fn is_empty(&self) -> bool {
        self.zero.is_empty() && self.copies.is_empty()
    }

    /// Makes the changes. All are checked before the first is made.
    pub(crate) fn apply<B: Backend>(
        &self,
        backend: &B,
        kv: &mut B::KvCache,
        layout: &KvLayout,
    ) -> Result<()> {
        /// Zeros are written in parts of about this size.
        const PART_BYTES: u64 = 16 << 20;
        layout.check_copies(&self.copies)?;
        layout.check_blocks(&self.zero)?;
        let block = layout.bytes() / (layout.blocks as u64).max(1);
        let blocks = (PART_BYTES / block.max(1)).max(1) as usize;
        for blocks in self.zero.chunks(blocks) {
            backend.write_blocks(kv, blocks, &vec![0; blocks.len() * block as usize])?;
        }
        if !self.copies.is_empty() {
            backend.copy_blocks(kv, &self.copies)?;
        }
        Ok(())
    }
}

/// A [`Runner`] that is a rank of a group: what [`crate::ranks`] asks of it, whatever the device.
pub(crate) trait RankRunner: Runner {
    /// The device in words.
    fn description(&self) -> String;

    /// Refuses a plan that contradicts itself, the pool, or what a step may hold. Nothing has been done then.
    fn check(&self, inputs: &StepInputs) -> Result<()>;

    /// This rank's part of a step whose outcome the leader reads.
    fn follow(&mut self, inputs: StepInputs, goal: &Goal) -> Result<()>;
}

/// What all ranks of a group do together.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Order {
    /// A step.
    Step(StepInputs, Goal),
    /// Changes to the KV pool.
    Blocks(BlockChanges),
}

/// What a step is run for, as followers hear it. What comes after the forward pass needs all ranks, too.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Goal {
    /// A token for each of these.
    pub rows: Arc<[OwnedSamplingRow]>,
    /// What then happens to the logits.
    pub logits: WholeLogits,
}

impl Goal {
    pub(crate) fn new(rows: &[SamplingRow<'_>], logits: WholeLogits) -> Self {
        Self { rows: rows.iter().map(OwnedSamplingRow::from).collect(), logits }
    }

    /// The rows, borrowed.
    pub(crate) fn rows(&self) -> Vec<SamplingRow<'_>> {
        self.rows.iter().map(OwnedSamplingRow::as_row).collect()
    }
}

/// The [`Runner`] on the CPU. A step runs inside the thread pool as a whole: entering it once instead of for every op
/// saves some hundred thread switches a token.
pub(crate) struct CpuRunner {
    model: Model<Cpu>,
    kv: KvCache,
}

impl CpuRunner {
    pub(crate) fn new(model: Model<Cpu>, layout: KvLayout) -> Result<Self> {
        let kv = model.kv_cache(layout)?;
        Ok(Self { model, kv })
    }
}

impl Runner for CpuRunner {
    fn run(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>], logits: WholeLogits) -> Result<Outcome> {
        let (model, kv) = (&self.model, &mut self.kv);
        let cpu = model.backend();
        cpu.install(|| {
            let Some(tensor) = model.forward(inputs, kv)? else { return Ok(Outcome::default()) };
            let (draws, whole) = use_logits(model, tensor, rows, logits)?;
            let logits = whole.map(|whole| cpu.to_host(&whole)).transpose()?.unwrap_or_default();
            Ok(Outcome { draws, logits })
        })
    }

    fn change_blocks(&mut self, changes: &BlockChanges) -> Result<()> {
        let layout = *self.kv.layout();
        changes.apply(self.model.backend(), &mut self.kv, &layout)
    }
}

impl RankRunner for CpuRunner {
    fn description(&self) -> String {
        self.model.backend().description()
    }

    fn check(&self, inputs: &StepInputs) -> Result<()> {
        Ok(inputs.check(self.kv.layout())?)
    }

    fn follow(&mut self, inputs: StepInputs, goal: &Goal) -> Result<()> {
        let (model, kv) = (&self.model, &mut self.kv);
        model.backend().install(|| {
            let Some(logits) = model.forward(inputs, kv)? else { return Ok(()) };
            use_logits(model, logits, &goal.rows(), goal.logits).map(drop)
        })
    }
}
