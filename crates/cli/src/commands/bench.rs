use std::process::ExitCode;

use anyhow::Result;
use longhaul_bench::{LatencyConfig, latency};

use longhaul_engine::Precision;

use crate::args::{BenchArgs, BenchCommand, LatencyArgs};
use crate::output;
use crate::progress;

/// `longhaul bench`
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    match &args.what {
        BenchCommand::Latency(args) => run_latency(args),
    }
}

fn run_latency(args: &LatencyArgs) -> Result<ExitCode> {
    let mut model = args.model.clone();
    // The context of the measurement, unless the user asks for another.
    let (input_len, output_len) = (args.input_len as usize, args.output_len as usize);
    model.max_model_len.get_or_insert(input_len + output_len);
    let mut engine = progress::load(&model.loader(Precision::Float32)?)?;
    let config = LatencyConfig {
        input_len,
        output_len,
        runs: args.runs,
        chunk: args.chunk,
        threads: args.model.threads,
    };
    let report = latency(&mut engine, &config, &mut |run, runs| eprintln!("run {run}/{runs}"))?;
    if args.json {
        output::json(&report)?
    } else {
        output::line(&report.to_string())?
    }
    Ok(ExitCode::SUCCESS)
}
