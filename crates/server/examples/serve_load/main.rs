//! What the server costs: HTTP, batching and streaming over a device that takes a fixed time for a step and computes
//! nothing, under a client in a process of its own on the same machine. See benches/README.md.
//!
//! ```sh
//! cargo run --release -p longhaul-server --example serve_load -- short streams one-step overload bodies --seconds 60
//! ```

mod client;
mod device;
mod scenarios;
mod server;

use std::process::ExitCode;

use serde_json::{Map, Value, json};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).collect::<Vec<_>>();
    if arguments.first().is_some_and(|first| first == "server") {
        return match server::Sizes::parse(&arguments.split_off(1)).map(server::run) {
            Ok(code) => code,
            Err(message) => usage(&message),
        };
    }
    let (mut seconds, mut names) = (60, Vec::new());
    let mut rest = arguments.into_iter();
    while let Some(argument) = rest.next() {
        match (argument.as_str(), scenarios::ALL.iter().find(|scenario| scenario.0 == argument)) {
            ("--seconds", _) => match rest.next().and_then(|n| n.parse().ok()).filter(|n| *n >= 12) {
                Some(n) => seconds = n,
                None => return usage("--seconds: a number of at least 12"),
            },
            (_, Some(scenario)) => names.push(*scenario),
            (other, None) => return usage(&format!("{other}: no such scenario")),
        }
    }
    if names.is_empty() {
        names = scenarios::ALL.to_vec();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return usage(&error.to_string()),
    };
    let mut results = Map::from_iter([
        ("cores".into(), json!(std::thread::available_parallelism().map_or(0, usize::from))),
        ("load_average_at_start".into(), load_average()),
        ("seconds".into(), json!(seconds)),
    ]);
    for (name, run) in names {
        match runtime.block_on(run(seconds)) {
            Ok(result) => {
                eprintln!("{name}: {result}");
                results.insert(name.into(), result);
            }
            Err(error) => {
                eprintln!("{name}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{:#}", Value::Object(results));
    ExitCode::SUCCESS
}

fn usage(message: &str) -> ExitCode {
    eprintln!("{message}\nusage: serve_load [short] [streams] [one-step] [overload] [bodies] [--seconds N]");
    ExitCode::from(64)
}

fn load_average() -> Value {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    json!(text.split(' ').next().and_then(|load| load.parse::<f64>().ok()))
}
