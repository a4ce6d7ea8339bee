//! The server's process.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use longhaul_engine::{BatchLimits, SamplingParams};
use longhaul_server::{
    BatchOptions, Batchable, Batched, Config, Endpoint, Limits, ModelInfo, QueueLimits, Server,
};
use longhaul_text::Tokenizer;

use crate::device::Device;

/// Sequences of a step at most.
const MAX_SEQUENCES: usize = 4096;

/// What a scenario sets.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Microseconds of a step.
    pub step: u64,
    /// Sequences that run at a time.
    pub sequences: usize,
    /// Requests that may wait.
    pub queue: usize,
}

impl Sizes {
    pub fn arguments(self) -> [String; 3] {
        [self.step.to_string(), self.sequences.to_string(), self.queue.to_string()]
    }

    pub fn parse(arguments: &[String]) -> Result<Self, String> {
        let numbers: Vec<u64> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
        match numbers[..] {
            [step, sequences, queue] => {
                Ok(Self { step, sequences: sequences as usize, queue: queue as usize })
            }
            _ => Err("server: step time in microseconds, sequences, queue".into()),
        }
    }
}

pub fn run(sizes: Sizes) -> ExitCode {
    match serve(sizes) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(sizes: Sizes) -> Result<(), Box<dyn std::error::Error>> {
    let config = Config { limits: Limits { connections: 16_384, ..Limits::default() }, ..Config::default() };
    let server = Server::bind(Endpoint::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))), config)?;
    let options = BatchOptions {
        queue: QueueLimits { requests: sizes.queue, ..QueueLimits::default() },
        max_num_seqs: Some(sizes.sequences),
        queued_events: Limits::default().queued_events,
        ..BatchOptions::default()
    };
    let batched = Batched::start(batchable(sizes)?, &options, |lost| eprintln!("{lost:?}"))?;
    server.lifecycle().ready(Arc::new(batched));
    println!("{}", server.url().trim_start_matches("http://"));
    server.run()?;
    Ok(())
}

fn batchable(sizes: Sizes) -> Result<Batchable, Box<dyn std::error::Error>> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo");
    let tokenizer = Tokenizer::from_file(&demo.join("tokenizer.json"))?;
    let model = ModelInfo {
        root: "fixed-step".into(),
        template: None,
        longest_token: 32,
        vocab_size: 1536,
        tokenizer: Some(tokenizer),
        max_model_len: 65_536,
        end_tokens: Vec::new(),
        sampling: SamplingParams { temperature: 1.0, ..SamplingParams::greedy() },
        max_new_tokens: None,
        max_logprobs: 20,
        block_size: 16,
        kv_blocks: 200_000,
    };
    Ok(Batchable {
        device: Box::new(Device { step_time: Duration::from_micros(sizes.step) }),
        model,
        padding_ids: Vec::new(),
        positions: String::new(),
        limits: BatchLimits { rows: 4 * MAX_SEQUENCES, sequences: MAX_SEQUENCES, logit_rows: MAX_SEQUENCES },
        prefill_rows: 2 * MAX_SEQUENCES,
        is_on_host: false,
    })
}
