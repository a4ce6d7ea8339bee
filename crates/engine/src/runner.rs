//! A model on a device behind one object-safe seam, so that the engine is not generic over devices.

use longhaul_backend::{Backend, KvLayout, Sampled, SamplingRow, StepInputs};
use longhaul_model::Model;

use crate::Result;

/// Runs steps. Logits stay on the device unless they are asked for.
pub(crate) trait Runner: Send {
    /// Runs a step and draws a token for each of its logit rows.
    fn sample(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>>;

    /// Runs a step and returns the logits `[logit_rows, vocab]` of the rows that want them.
    fn logits(&mut self, inputs: StepInputs) -> Result<Vec<f32>>;
}

/// The [`Runner`] of one rank.
pub(crate) struct ModelRunner<B: Backend> {
    model: Model<B>,
    kv: B::KvCache,
}

impl<B: Backend> ModelRunner<B> {
    pub(crate) fn new(model: Model<B>, layout: KvLayout) -> Result<Self> {
        let kv = model.kv_cache(layout)?;
        Ok(Self { model, kv })
    }
}

impl<B: Backend> Runner for ModelRunner<B>
where
    Model<B>: Send,
    B::KvCache: Send,
{
    fn sample(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>> {
        match self.model.forward(inputs, &mut self.kv)? {
            Some(logits) => Ok(self.model.backend().sample(&logits, rows)?),
            None => Ok(Vec::new()),
        }
    }

    fn logits(&mut self, inputs: StepInputs) -> Result<Vec<f32>> {
        match self.model.forward(inputs, &mut self.kv)? {
            Some(logits) => Ok(self.model.backend().to_host(&logits)?),
            None => Ok(Vec::new()),
        }
    }
}
