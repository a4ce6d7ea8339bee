//! A device that is gone.

use std::sync::mpsc::channel;
use std::time::Duration;

use longhaul_backend::{Error as BackendError, SequenceInputs};
use longhaul_engine::{BatchError, BatchResults, BatchStep, EngineError};
use longhaul_server::{
    BatchOptions, Batchable, Batched, Defaults, Event, Failure, Refusal, Serving, StepDevice,
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
        let mut last = None;
        while let Some(event) = next(&mut stream).await {
            last = Some(event);
        }
        assert!(matches!(last, Some(Event::Failed(Failure::Engine(_)))), "{last:?}");
        assert!(batched.health().is_err());
        assert!(matches!(batched.submit(submission(&[1])).map(drop), Err(Refusal::Unavailable(_))));
    }
}
