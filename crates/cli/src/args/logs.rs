use clap::{Args, ValueEnum};
use longhaul_server::{Level, LogFormat};

/// What is logged, where to, and how.
#[derive(Debug, Args)]
#[command(next_help_heading = "Logs and traces")]
pub struct LogArgs {
    /// Lines of text, or one JSON object a line, on stderr
    #[arg(long, value_enum, default_value_t = LogFormatArg::Text)]
    pub log_format: LogFormatArg,
    /// Events of at least this importance: off, error, warning, info, debug or trace
    #[arg(long, env = "VLLM_LOGGING_LEVEL", value_parser = level, default_value = "info", value_name = "LEVEL")]
    pub log_level: Level,
    /// The same for the record that there is of every request: info shows them, debug those of probes and scrapes, too
    #[arg(long, value_parser = level, default_value = "info", value_name = "LEVEL")]
    pub uvicorn_log_level: Level,
    /// No records of requests
    #[arg(long)]
    pub disable_uvicorn_access_log: bool,
    /// Routes without records, such as /tokenize,/v1/models
    #[arg(long, value_delimiter = ',', value_name = "ROUTE,…")]
    pub disable_access_log_for_endpoints: Vec<String>,
    /// Log prompts and parameters of requests: what users say ends up in the log
    #[arg(long)]
    pub enable_log_requests: bool,
    /// Log answers
    #[arg(long)]
    pub enable_log_outputs: bool,
    /// Characters of a prompt or an answer that are logged
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub max_log_len: usize,
    /// Send a span for every request to this collector, OTLP over HTTP, such as http://collector:4318/v1/traces
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormatArg {
    Text,
    Json,
}

impl From<LogFormatArg> for LogFormat {
    fn from(format: LogFormatArg) -> Self {
        match format {
            LogFormatArg::Text => LogFormat::Text,
            LogFormatArg::Json => LogFormat::Json,
        }
    }
}

impl LogArgs {
    /// The importance from which on records of requests are shown.
    pub fn requests_level(&self) -> Level {
        if self.disable_uvicorn_access_log { Level::Off } else { self.uvicorn_log_level }
    }
}

/// A level by any of the names that are in use for it.
fn level(name: &str) -> Result<Level, String> {
    Ok(match name.to_ascii_lowercase().as_str() {
        "off" => Level::Off,
        "critical" | "error" => Level::Error,
        "warning" | "warn" => Level::Warn,
        "info" => Level::Info,
        "debug" => Level::Debug,
        "trace" => Level::Trace,
        _ => return Err("expected off, error, warning, info, debug or trace".into()),
    })
}
