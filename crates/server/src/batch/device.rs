//! The thread that runs steps on the device, in the order of their plans.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use longhaul_backend::SequenceInputs;
use longhaul_engine::{BatchError, BatchResults, BatchStep, Engine, EngineError};
use longhaul_scheduler::{PendingId, StepId};

use super::Message;
use super::status::Status;

/// Runs steps: an engine, or what stands in for one.
pub trait StepDevice: Send + 'static {
    /// Runs a step.
    ///
    /// # Errors
    /// [`BatchError`], which says whether the device goes on.
    fn step(&mut self, step: BatchStep) -> Result<BatchResults, BatchError>;

    /// Operations of a step: what its time is judged by.
    fn operations(&self, sequences: &[SequenceInputs]) -> u64;
}

impl StepDevice for Engine {
    fn step(&mut self, step: BatchStep) -> Result<BatchResults, BatchError> {
        self.run_batch(step)
    }

    fn operations(&self, sequences: &[SequenceInputs]) -> u64 {
        self.spec().step_flops(sequences)
    }
}

/// A planned step on its way to the device.
pub(super) struct Order {
    pub(super) id: StepId,
    pub(super) step: BatchStep,
    /// Rows whose ids were drawn in the step before.
    pub(super) pending: Vec<PendingId>,
    /// Which of the step's draws belongs to each sample of the plan.
    pub(super) samples: Vec<usize>,
}

/// What came of it.
pub(super) struct Done {
    pub(super) id: StepId,
    pub(super) result: Result<BatchResults, BatchError>,
}

/// Runs steps until there are no more, or the device is lost; then it is dropped.
pub(super) fn run(
    mut device: Box<dyn StepDevice>,
    orders: &Receiver<Order>,
    inbox: &Sender<Message>,
    status: &Status,
) {
    // Ids that the last step drew, by sample of its plan; 0 where it drew none, in rows that nobody will look at.
    let mut drawn: Vec<u32> = Vec::new();
    for Order { id, mut step, pending, samples } in orders {
        for PendingId { row, sample } in pending {
            if let (Some(slot), Some(token)) = (step.ids.get_mut(row), drawn.get(sample)) {
                *slot = *token;
            }
        }
        let size = device.operations(&step.sequences);
        let began = Instant::now();
        status.step_begins(size, began);
        let result = catch_unwind(AssertUnwindSafe(|| device.step(step))).unwrap_or_else(|_| {
            let error =
                EngineError::Device { device: "the model's".into(), message: "a step panicked".into() };
            Err(BatchError { error: Box::new(error), survived: false })
        });
        status.step_ends(size, began.elapsed());
        let lost = matches!(&result, Err(error) if !error.survived);
        drawn = match &result {
            Ok(results) => {
                let id = |draw: &usize| results.draws.get(*draw)?.as_ref().ok().map(|sampled| sampled.id);
                samples.iter().map(|draw| id(draw).unwrap_or(0)).collect()
            }
            Err(_) => Vec::new(),
        };
        if inbox.send(Message::Done(Done { id, result })).is_err() || lost {
            return;
        }
    }
}
