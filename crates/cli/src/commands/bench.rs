use std::process::ExitCode;

use anyhow::Result;
use longhaul_bench::collectives::{self, CollectivesReport, ElementType, Operation};
use longhaul_bench::kernels::{KernelsConfig, kernels};
use longhaul_bench::{LatencyConfig, latency};
use longhaul_engine::{DeviceOptions, EngineError, Loader, Precision, kernel_context};
use longhaul_model::family_names;

use crate::args::{BenchArgs, BenchCommand, CollectivesArgs, ImplementationArg, KernelsArgs, LatencyArgs};
use crate::exit::UsageError;
use crate::output;
use crate::progress;

/// `longhaul bench`
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    match &args.what {
        BenchCommand::Latency(args) => run_latency(args),
        BenchCommand::Kernels(args) => run_kernels(args),
        BenchCommand::Collectives(args) => run_collectives(args),
        #[cfg(target_os = "linux")]
        BenchCommand::CollectivesRank => {
            collectives::rank_process(std::io::stdin().lock())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run_kernels(args: &KernelsArgs) -> Result<ExitCode> {
    if let Some(model) = &args.model
        && !family_names().any(|name| name == model)
    {
        let names: Vec<&str> = family_names().collect();
        return Err(
            EngineError::UnknownModel(format!("--model {model}: none of {}", names.join(", "))).into()
        );
    }
    let options =
        DeviceOptions { device: args.device, kernels: args.kernels.into(), ..DeviceOptions::default() };
    let (context, launches) = kernel_context(&options)?;
    let config = KernelsConfig { op: args.op.clone(), model: args.model.clone() };
    let bar = progress::bar("measuring {bar:30} {pos}/{len} kernels ETA {eta}");
    let report = kernels(&context, launches, &config, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let report = report.map_err(|e| EngineError::Backend(e.into()))?;
    if report.kernels.is_empty() {
        return Err(UsageError("--op and --model leave no kernel; see the table without them".into()).into());
    }
    if args.json {
        output::json(&report)?
    } else {
        output::line(&report.to_string())?
    }
    Ok(ExitCode::SUCCESS)
}

/// The model to load for `bench latency`.
pub fn latency_loader(args: &LatencyArgs) -> Result<Loader, EngineError> {
    let mut model = args.model.clone();
    // The context of the measurement, unless the user asks for another.
    model.max_model_len.get_or_insert(args.input_len as usize + args.output_len as usize);
    model.loader(Precision::Auto)
}

fn run_latency(args: &LatencyArgs) -> Result<ExitCode> {
    let (input_len, output_len) = (args.input_len as usize, args.output_len as usize);
    let mut engine = progress::load(&latency_loader(args)?)?;
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

/// The command of a rank that is a process: this program once more.
#[cfg(target_os = "linux")]
fn rank_command() -> std::io::Result<std::process::Command> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["bench", "collectives-rank"]);
    Ok(command)
}

fn run_collectives(args: &CollectivesArgs) -> Result<ExitCode> {
    let operations: Vec<Operation> = args.operation.iter().map(|&o| o.into()).collect();
    let elements: Vec<ElementType> = args.dtype.iter().map(|&e| e.into()).collect();
    let cases = collectives::cases(&operations, &elements, &args.sizes);
    let context = if args.implementation.contains(&ImplementationArg::Peer) {
        let options = DeviceOptions { device: args.device, ..DeviceOptions::default() };
        Some(kernel_context(&options)?)
    } else {
        None
    };
    let mut report = CollectivesReport::new(context.as_ref().map(|(context, _)| context));
    let runs = args.implementation.len() * args.ranks.len();
    let bar = progress::bar("measuring {bar:30} {pos}/{len} operations ETA {eta}");
    bar.set_length((runs * cases.len()) as u64);
    for &implementation in &args.implementation {
        for ranks in args.ranks.iter().map(|&n| usize::from(n)) {
            let before = bar.position();
            let mut progress = |done: usize, _: usize| bar.set_position(before + done as u64);
            let figures = match (implementation, &context) {
                (ImplementationArg::Threads, _) => {
                    collectives::threads(ranks, &cases, args.seconds, &mut progress)?
                }
                #[cfg(target_os = "linux")]
                (ImplementationArg::Processes, _) => {
                    collectives::processes(ranks, &cases, args.seconds, &rank_command, &mut progress)?
                }
                (ImplementationArg::Peer, Some((context, launches))) => {
                    collectives::peers(context, *launches, ranks, &cases, &mut progress)?
                }
                (ImplementationArg::Peer, None) => Vec::new(),
            };
            report.collectives.extend(figures);
            bar.set_position(before + cases.len() as u64);
        }
    }
    bar.finish_and_clear();
    if report.collectives.is_empty() {
        let message = "--implementation peer has all_reduce of float32 and bfloat16 only";
        return Err(UsageError(message.into()).into());
    }
    if args.json {
        output::json(&report)?
    } else {
        output::line(&report.to_string())?
    }
    Ok(ExitCode::SUCCESS)
}
