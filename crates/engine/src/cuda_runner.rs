//! The [`Runner`] on a CUDA device, real or emulated.

use std::collections::HashMap;

use longhaul_backend::{Backend, Error, KvLayout, SamplingRow, StepInputs};
use longhaul_cuda::driver::GraphId;
use longhaul_cuda::kv::KvCache;
use longhaul_cuda::{Cuda, Tensor};
use longhaul_model::Model;

use crate::Result;
use crate::runner::{BlockChanges, Goal, Outcome, RankRunner, Runner, WholeLogits, use_logits};

/// Runs steps eagerly, and pure-decode steps from recorded graphs once a batch size has been seen.
pub(crate) struct CudaRunner {
    model: Model<Cuda>,
    kv: KvCache,
    /// By bucket of rows: seen once (`None`), then recorded.
    graphs: HashMap<usize, Option<GraphId>>,
    use_graphs: bool,
}

impl CudaRunner {
    pub(crate) fn new(model: Model<Cuda>, layout: KvLayout, use_graphs: bool) -> Result<Self> {
        let kv = model.kv_cache(layout)?;
        let use_graphs = use_graphs && model.backend().group().can_be_recorded();
        Ok(Self { model, kv, graphs: HashMap::new(), use_graphs })
    }

    fn forward(&mut self, inputs: StepInputs) -> Result<Option<Tensor>> {
        let rows = inputs.rows();
        let cuda = self.model.backend();
        let bucket = bucket(rows, cuda.limits().rows.min(cuda.limits().sequences));
        let (true, Some(bucket)) = (self.use_graphs && is_decode(&inputs), bucket) else {
            return Ok(self.model.forward(inputs, &mut self.kv)?);
        };
        let graph = match self.graphs.get(&bucket) {
            // The first step of a bucket runs eagerly: what libraries load or choose once is not for a recording.
            None => {
                self.graphs.insert(bucket, None);
                return Ok(self.model.forward(inputs, &mut self.kv)?);
            }
            Some(Some(graph)) => *graph,
            Some(None) => {
                let padded = pad(inputs.clone(), bucket);
                cuda.prepare(padded.clone(), &self.kv)?;
                let (model, kv) = (&self.model, &mut self.kv);
                let recorded = cuda.record(|| model.forward(padded, kv).map_err(step_error));
                if let Err(error @ Error::DeviceLost(_)) = recorded {
                    return Err(error.into());
                }
                // All ranks replay or none does: a replay exchanges the rows of its bucket.
                match (cuda.all_agree(recorded.is_ok())?, recorded) {
                    (true, Ok((graph, _))) => {
                        self.graphs.insert(bucket, Some(graph));
                        graph
                    }
                    // A device that cannot hold one more recording still runs the step op by op, as from now on.
                    (_, recorded) => {
                        if let Ok((graph, _)) = recorded {
                            cuda.drop_graph(graph);
                        }
                        self.use_graphs = false;
                        return Ok(self.model.forward(inputs, &mut self.kv)?);
                    }
                }
            }
        };
        cuda.prepare(inputs, &self.kv)?;
        cuda.replay(graph)?;
        Ok(Some(cuda.last_logits(rows)))
    }
}

/// The backend's error inside a model's.
fn step_error(error: longhaul_model::ModelError) -> longhaul_backend::Error {
    match error {
        longhaul_model::ModelError::Backend(error) => error,
        other => longhaul_backend::Error::Load(Box::new(other)),
    }
}

/// One row a sequence, and the logits of all of them.
fn is_decode(inputs: &StepInputs) -> bool {
    inputs.sequences.iter().all(|s| s.rows == 1) && inputs.logit_rows.iter().copied().eq(0..inputs.rows())
}

/// The recorded batch size that serves `rows`: 1, 2, 4, then multiples of 8.
fn bucket(rows: usize, limit: usize) -> Option<usize> {
    let bucket = match rows {
        0..=2 => rows,
        3..=4 => 4,
        _ => rows.next_multiple_of(8),
    };
    (bucket <= limit && bucket > 0).then_some(bucket)
}

/// `inputs` with its last sequence repeated up to `rows` rows. Only recorded, never run: it stands for the shape.
fn pad(mut inputs: StepInputs, rows: usize) -> StepInputs {
    while inputs.rows() < rows {
        let (Some(id), Some(scale), Some(sequence)) = (
            inputs.ids.last().copied(),
            inputs.logit_scales.last().copied(),
            inputs.sequences.last().cloned(),
        ) else {
            break;
        };
        inputs.logit_rows.push(inputs.ids.len());
        inputs.ids.push(id);
        inputs.logit_scales.push(scale);
        inputs.sequences.push(sequence);
    }
    inputs
}

impl Runner for CudaRunner {
    fn run(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>], logits: WholeLogits) -> Result<Outcome> {
        let Some(tensor) = self.forward(inputs)? else { return Ok(Outcome::default()) };
        let (draws, whole) = use_logits(&self.model, tensor, rows, logits)?;
        let logits = whole.map(|whole| self.model.backend().to_host(&whole)).transpose()?.unwrap_or_default();
        Ok(Outcome { draws, logits })
    }

    fn change_blocks(&mut self, changes: &BlockChanges) -> Result<()> {
        let layout = *self.kv.layout();
        changes.apply(self.model.backend(), &mut self.kv, &layout)
    }

    fn max_rows(&self) -> usize {
        self.model.backend().limits().rows
    }

    fn max_sequences(&self) -> usize {
        self.model.backend().limits().sequences
    }

    fn is_on_host(&self) -> bool {
        false
    }

    fn default_chunk(&self) -> usize {
        // Step memory for all these rows is taken in any case.
        self.max_rows()
    }

    fn max_logit_rows(&self) -> usize {
        self.model.backend().limits().logit_rows
    }
}

impl RankRunner for CudaRunner {
    fn description(&self) -> String {
        let cuda = self.model.backend();
        let device = longhaul_cuda::describe(cuda.context());
        match cuda.group().world_size() {
            1 => device,
            ranks => format!("{device}, {ranks} ranks, all-reduce {}", cuda.group().all_reduce_way()),
        }
    }

    fn check(&self, inputs: &StepInputs) -> Result<()> {
        Ok(self.model.backend().check(inputs, &self.kv)?)
    }

    fn follow(&mut self, inputs: StepInputs, goal: &Goal) -> Result<()> {
        let Some(logits) = self.forward(inputs)? else { return Ok(()) };
        let (_, whole) = use_logits(&self.model, logits, &goal.rows(), goal.logits)?;
        if whole.is_some() {
            let cuda = self.model.backend();
            cuda.group().check(cuda.context()).map_err(Error::from)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use longhaul_backend::SequenceInputs;

    #[test]
    fn buckets_hold_their_rows() {
        for rows in 1..=64 {
            let bucket = bucket(rows, 64).unwrap();
            assert!(bucket >= rows && bucket <= 64);
            assert!(bucket - rows < 8);
        }
        assert_eq!(bucket(65, 64), None);
        assert_eq!(bucket(3, 3), None, "a padded batch must fit, too");
    }

    #[test]
    fn padding_is_a_consistent_plan() {
        let inputs = StepInputs {
            ids: vec![1, 2, 3],
            logit_scales: vec![1.0; 3],
            sequences: vec![SequenceInputs { rows: 1, kv_len: 4, block_table: vec![0] }; 3],
            logit_rows: vec![0, 1, 2],
        };
        assert!(is_decode(&inputs));
        let padded = pad(inputs, 4);
        assert!(is_decode(&padded));
        assert_eq!((padded.rows(), padded.sequences.len()), (4, 4));
    }
}
