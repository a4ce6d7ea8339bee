//! Errors to messages and exit codes (sysexits.h).

use std::io;
use std::process::ExitCode;

use longhaul_backend::Error as BackendError;
use longhaul_engine::EngineError;
use longhaul_longdoc::LongdocError;
use longhaul_model::ModelError;
use longhaul_server::{KeyError, ServerError, TlsError, TraceError};
use longhaul_text::TextError;

use crate::output;

const USAGE: u8 = 64;
const DATA: u8 = 65;
const NO_INPUT: u8 = 66;
const UNAVAILABLE: u8 = 69;
const SOFTWARE: u8 = 70;
const OS: u8 = 71;
const IO: u8 = 74;
/// Another rank is lost, or requests were cut: start all again.
pub const RESTART: u8 = 75;
/// The device is lost: start the process again, elsewhere if it happens twice.
const DEVICE_LOST: u8 = 76;
const CONFIG: u8 = 78;

/// Wrong usage that only shows after parsing.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Prints `error` with its causes and returns the exit code that fits it.
pub fn report(error: &anyhow::Error) -> ExitCode {
    // The reader of a pipe went away (`longhaul … | head`): nothing to report.
    if error
        .chain()
        .any(|e| e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
    {
        return ExitCode::SUCCESS;
    }
    let (message, code) = explain(error);
    output::tell(format_args!("error: {message}"));
    code
}

/// `error` with its causes, and the exit code that fits it.
pub fn explain(error: &anyhow::Error) -> (String, ExitCode) {
    let mut message = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        // Transparent wrappers repeat their source.
        if !message.ends_with(&cause) {
            if !message.is_empty() {
                message.push_str(": ");
            }
            message.push_str(&cause);
        }
    }
    (message, ExitCode::from(code(error)))
}

/// Ends the process because its group of ranks has ended while the main thread is stuck in a step, or waits for somebody.
pub fn group_lost(message: &str) {
    output::tell(format_args!("error: {message}"));
    std::process::exit(RESTART.into());
}

fn code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if cause.is::<UsageError>() {
            return USAGE;
        }
        if let Some(error) = cause.downcast_ref::<EngineError>() {
            return engine_code(error);
        }
        if let Some(error) = cause.downcast_ref::<ModelError>() {
            return model_code(error);
        }
        if let Some(error) = cause.downcast_ref::<LongdocError>() {
            return match error {
                LongdocError::Engine(error) => engine_code(error),
                _ => DATA,
            };
        }
        if let Some(error) = cause.downcast_ref::<ServerError>() {
            return match error {
                ServerError::Unauthenticated { .. } => USAGE,
                ServerError::Bind { .. } | ServerError::Start(_) => OS,
                ServerError::EngineLost(loss) => {
                    if loss.is_device {
                        DEVICE_LOST
                    } else {
                        RESTART
                    }
                }
            };
        }
        if cause.is::<TextError>() {
            return DATA;
        }
        if cause.is::<TraceError>() {
            return USAGE;
        }
        if cause.is::<KeyError>() || cause.is::<TlsError>() {
            return CONFIG;
        }
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            return if error.kind() == io::ErrorKind::NotFound { NO_INPUT } else { IO };
        }
    }
    SOFTWARE
}

fn engine_code(error: &EngineError) -> u8 {
    match error {
        EngineError::Parameter { .. } | EngineError::UnknownModel(_) => USAGE,
        EngineError::Device { .. } => UNAVAILABLE,
        EngineError::Memory { .. } => OS,
        EngineError::TooLong { .. } | EngineError::Text(_) => DATA,
        EngineError::NoTokenizer { .. } | EngineError::NoChatTemplate { .. } => CONFIG,
        EngineError::File { .. } | EngineError::Weights(_) => NO_INPUT,
        EngineError::Rank { source, .. } => engine_code(source),
        EngineError::Nodes(error) => error.exit_code(),
        EngineError::Model(error) => model_code(error),
        EngineError::Backend(error) => backend_code(error),
    }
}

fn model_code(error: &ModelError) -> u8 {
    match error {
        ModelError::Shard(_) => USAGE,
        ModelError::Weights(_) => NO_INPUT,
        ModelError::Backend(error) => backend_code(error),
        _ => CONFIG,
    }
}

fn backend_code(error: &BackendError) -> u8 {
    match error {
        BackendError::OutOfMemory { .. } => OS,
        BackendError::DeviceLost(_) => DEVICE_LOST,
        BackendError::Collective(_) => RESTART,
        _ => SOFTWARE,
    }
}

#[cfg(test)]
mod tests {
    use longhaul_server::EngineLost;

    use super::*;

    #[test]
    fn a_lost_engine_is_started_again_and_a_lost_device_elsewhere() {
        for (is_device, code) in [(false, RESTART), (true, DEVICE_LOST)] {
            let lost = EngineLost { reason: "a step failed".into(), is_device };
            let error = anyhow::Error::from(ServerError::EngineLost(lost)).context("serving");
            assert_eq!(super::code(&error), code);
            assert!(explain(&error).0.contains("the engine is lost: a step failed"));
        }
    }
}
