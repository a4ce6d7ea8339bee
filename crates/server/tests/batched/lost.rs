//! A device that is gone.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use longhaul_backend::{Error as BackendError, SequenceInputs};
use longhaul_engine::{BatchError, BatchResults, BatchStep, EngineError};
use longhaul_server::{
    BatchOptions, Batchable, Batched, Defaults, Event, EventStream, Failure, Grammar, Matcher, Refusal,
    Serving, StepDevice, Submission,
};

use crate::harness::{demo, next, submission};

/// Fails every step for good.
struct Gone(fn() -> EngineError);

impl StepDevice for Gone {
    fn step(&mut self, _: BatchStep) -> Result<BatchResults, BatchError> {
        Err(BatchError { error: Box::new((self.0)()), survived: false })
    }

    fn operations(&self, _: &[SequenceInputs]) -> u64 {
        1
    }
}

fn device_lost() -> EngineError {
    EngineError::Backend(BackendError::DeviceLost("it fell off the bus".into()))
}

fn rank_lost() -> EngineError {
    EngineError::Rank { rank: 1, source: Box::new(device_lost()) }
}

fn other() -> EngineError {
    EngineError::Device { device: "cpu".into(), message: "it stands still".into() }
}

async fn assert_failed(stream: &mut EventStream) {
    let mut last = None;
    while let Some(event) = next(stream).await {
        last = Some(event);
    }
    assert!(matches!(last, Some(Event::Failed(Failure::Engine(_)))), "{last:?}");
}

/// A grammar that takes the step loop with it.
#[derive(Debug)]
struct Bomb;

impl Grammar for Bomb {
    fn matcher(&self) -> Box<dyn Matcher> {
        Box::new(Self)
    }
}

impl Matcher for Bomb {
    fn allowed(&mut self) -> Result<&[u32], String> {
        panic!("a bug")
    }

    fn accept(&mut self, _: u32) -> Result<(), String> {
        Ok(())
    }
}

#[tokio::test]
async fn a_step_loop_that_panics_is_a_lost_engine() {
    let batchable = Batchable::engine(demo(), "demo".into(), Defaults::Neutral);
    let (lost, heard) = channel();
    let batched =
        Batched::start(batchable, &BatchOptions::default(), move |loss| lost.send(loss).unwrap()).unwrap();
    let bomb = Submission { grammar: Some(Arc::new(Bomb)), ..submission(&[1, 2, 3]) };
    let mut stream = batched.submit(bomb).unwrap();
    let loss = heard.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(!loss.is_device && loss.reason.contains("panicked"), "{loss:?}");
    assert_failed(&mut stream).await;
    assert!(batched.health().is_err());
    assert!(matches!(batched.submit(submission(&[1])).map(drop), Err(Refusal::Unavailable(_))));
}

#[tokio::test]
async fn the_owner_hears_whether_the_device_was_lost_and_requests_fail() {
    for (error, is_device) in [(device_lost as fn() -> EngineError, true), (rank_lost, true), (other, false)]
    {
        let mut batchable = Batchable::engine(demo(), "demo".into(), Defaults::Neutral);
        batchable.device = Box::new(Gone(error));
        let (lost, heard) = channel();
        let options = BatchOptions { queued_events: 4096, ..BatchOptions::default() };
        let batched = Batched::start(batchable, &options, move |loss| lost.send(loss).unwrap()).unwrap();
        let mut stream = batched.submit(submission(&[1, 2, 3])).unwrap();
        let loss = heard.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!((loss.is_device, loss.reason), (is_device, error().to_string()));
        assert_failed(&mut stream).await;
        assert!(batched.health().is_err());
        assert!(matches!(batched.submit(submission(&[1])).map(drop), Err(Refusal::Unavailable(_))));
    }
}
