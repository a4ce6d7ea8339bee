//! A device whose steps take a fixed time and whose tokens tell when they were drawn.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use longhaul_backend::{Sampled, SequenceInputs};
use longhaul_engine::{BatchError, BatchResults, BatchStep, Scores};
use longhaul_server::StepDevice;

/// Values of the clock in tokens: ids of ordinary tokens of the demo's tokenizer.
const CLOCK_VALUES: u64 = 1500;

/// What one of them lasts, in microseconds.
pub const CLOCK_MICROSECONDS: u64 = 100;

/// The clock as a token id.
pub fn clock() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    (now / CLOCK_MICROSECONDS % CLOCK_VALUES) as u32
}

/// Time since a token was drawn, in units of the clock; a multiple of its whole length more is not seen.
pub fn since(token: u32) -> usize {
    ((u64::from(clock()) + CLOCK_VALUES - u64::from(token)) % CLOCK_VALUES) as usize
}

/// The longest time that can be told, in units of the clock.
pub const LONGEST: usize = CLOCK_VALUES as usize;

pub struct Device {
    pub step_time: Duration,
}

impl StepDevice for Device {
    fn step(&mut self, step: BatchStep) -> Result<BatchResults, BatchError> {
        let began = Instant::now();
        sleep(self.step_time.saturating_sub(began.elapsed()));
        let drawn = Sampled { id: clock(), logprob: -1.0 };
        Ok(BatchResults {
            draws: step.draws.iter().map(|_| Ok(drawn)).collect(),
            scores: step.scores.iter().map(|_| Scores::default()).collect(),
        })
    }

    fn operations(&self, sequences: &[SequenceInputs]) -> u64 {
        sequences.len() as u64
    }
}
