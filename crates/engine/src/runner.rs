//! A model on a device behind one object-safe seam, so that the engine is not generic over devices.

use longhaul_backend::{Backend, KvLayout, Sampled, SamplingRow, StepInputs};
use longhaul_cpu::{Cpu, KvCache};
use longhaul_model::Model;

use crate::Result;

/// Runs steps. Logits stay on the device unless they are asked for.
pub(crate) trait Runner: Send {
    /// Runs a step and draws a token for each of its logit rows.
    fn sample(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>>;

    /// Runs a step and returns the logits `[logit_rows, vocab]` of the rows that want them.
    fn logits(&mut self, inputs: StepInputs) -> Result<Vec<f32>>;

    /// Most rows of a step.
    fn max_rows(&self) -> usize {
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

/// A [`Runner`] that is a rank of a group: what [`crate::ranks`] asks of it, whatever the device.
pub(crate) trait RankRunner: Runner {
    /// The device in words.
    fn description(&self) -> String;

    /// Refuses a plan that contradicts itself, the pool, or what a step may hold. Nothing has been done then.
    fn check(&self, inputs: &StepInputs) -> Result<()>;

    /// This rank's part of a step whose logits other ranks read.
    fn follow(&mut self, inputs: StepInputs) -> Result<()>;
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
    fn sample(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>> {
        let (model, kv) = (&self.model, &mut self.kv);
        let cpu = model.backend();
        cpu.install(|| match model.forward(inputs, kv)? {
            Some(logits) => Ok(cpu.sample(&model.gather_logits(logits)?, rows)?),
            None => Ok(Vec::new()),
        })
    }

    fn logits(&mut self, inputs: StepInputs) -> Result<Vec<f32>> {
        let (model, kv) = (&self.model, &mut self.kv);
        let cpu = model.backend();
        cpu.install(|| match model.forward(inputs, kv)? {
            Some(logits) => Ok(cpu.to_host(&model.gather_logits(logits)?)?),
            None => Ok(Vec::new()),
        })
    }
}

impl RankRunner for CpuRunner {
    fn description(&self) -> String {
        self.model.backend().description()
    }

    fn check(&self, inputs: &StepInputs) -> Result<()> {
        Ok(inputs.check(self.kv.layout())?)
    }

    fn follow(&mut self, inputs: StepInputs) -> Result<()> {
        let (model, kv) = (&self.model, &mut self.kv);
        Ok(model.backend().install(|| {
            let logits = model.forward(inputs, kv)?;
            logits.map_or(Ok(()), |logits| model.gather_logits(logits).map(drop))
        })?)
    }
}
