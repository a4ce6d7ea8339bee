use std::net::{SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use longhaul_engine::{EngineError, Loader, Precision};
use longhaul_server::{ApiKeys, Config, Defaults, Lifecycle, Limits, QueueLimits, Server, SingleSequence};

use crate::args::{GenerationConfigArg, ModelArgs, ServeArgs};
use crate::exit::{self, UsageError};

/// Variables that may hold one API key.
const KEY_VARIABLES: [&str; 2] = ["LONGHAUL_API_KEY", "VLLM_API_KEY"];

/// The model that is served.
fn model(args: &ServeArgs) -> ModelArgs {
    let mut model = args.model.clone();
    if let Some(tag) = &args.model_tag {
        model.model.clone_from(tag);
    }
    model
}

/// How the command loads.
///
/// # Errors
/// A model name that means nothing.
pub fn loader(args: &ServeArgs) -> Result<Loader, EngineError> {
    model(args).loader(Precision::Fastest)
}

/// `longhaul serve`
pub fn run(args: &ServeArgs) -> Result<ExitCode> {
    let model = model(args);
    let loader = loader(args)?;
    let address = address(&args.http.host, args.http.port)?;
    let server = Server::bind(address, config(args)?)?;
    eprintln!("listening on http://{}, loading {}", server.address(), model.model);
    if args.http.allow_unauthenticated {
        eprintln!("warning: --allow-unauthenticated: everybody who reaches this port may use it");
    }

    let lifecycle = server.lifecycle();
    let queue = QueueLimits {
        requests: args.queue.max_num_queued_reqs,
        tokens: args.queue.max_num_queued_tokens.unwrap_or(usize::MAX),
        ..QueueLimits::default()
    };
    let defaults = match args.http.generation_config {
        GenerationConfigArg::Auto => Defaults::Checkpoint,
        GenerationConfigArg::Neutral => Defaults::Neutral,
    };
    let loading = std::thread::Builder::new().name("longhaul-load".into()).spawn(move || {
        let result = load(&loader, &model.model, &lifecycle, queue, defaults);
        if result.is_err() {
            lifecycle.abandon();
        }
        result
    })?;
    let drained = server.run()?;
    // A model that is still loading is left behind; the process ends.
    if loading.is_finished() {
        loading.join().map_err(|_| anyhow!("loading the model failed"))??;
    }
    if drained.cut > 0 {
        eprintln!("stopped; {} requests were cut when the time to finish was over", drained.cut);
        return Ok(ExitCode::from(exit::RESTART));
    }
    eprintln!("stopped; every request was finished");
    Ok(ExitCode::SUCCESS)
}

fn load(
    loader: &Loader,
    root: &str,
    lifecycle: &Lifecycle,
    queue: QueueLimits,
    defaults: Defaults,
) -> Result<()> {
    let engine = loader.load(&mut |done, total| lifecycle.progress(done, total))?;
    engine.notes().iter().for_each(|note| eprintln!("note: {note}"));
    let device = engine.device().to_owned();
    let serving = SingleSequence::start(engine, root.to_owned(), queue, defaults)?;
    lifecycle.ready(Arc::new(serving));
    eprintln!("ready: {root} on {device}");
    Ok(())
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    let unusable = |reason: String| UsageError(format!("--host {host}: {reason}"));
    let mut addresses = (host, port)
        .to_socket_addrs()
        .map_err(|e| unusable(format!("is no address of this machine: {e}")))?;
    Ok(addresses.next().ok_or_else(|| unusable("has no address".into()))?)
}

fn config(args: &ServeArgs) -> Result<Config> {
    let http = &args.http;
    let some = |time: Duration| (!time.is_zero()).then_some(time);
    Ok(Config {
        served_model_names: http.served_model_name.clone(),
        api_keys: keys(args)?,
        allow_unauthenticated: http.allow_unauthenticated,
        allowed_hosts: http.allowed_hosts.clone(),
        request_id_headers: http.enable_request_id_headers,
        force_include_usage: http.enable_force_include_usage,
        prompt_tokens_details: http.enable_prompt_tokens_details,
        sse_keep_alive: some(http.sse_keep_alive_interval),
        response_role: http.response_role.clone(),
        drain_delay: http.drain_delay,
        drain_timeout: http.shutdown_timeout,
        limits: Limits {
            connections: http.max_connections,
            request_time: some(http.request_timeout),
            ..Limits::default()
        },
    })
}

fn keys(args: &ServeArgs) -> Result<ApiKeys> {
    let mut keys = ApiKeys::default();
    if let Some(path) = &args.http.api_key_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("--api-key-file {}: cannot be read", path.display()))?;
        keys = ApiKeys::parse(&text).with_context(|| format!("--api-key-file {}", path.display()))?;
    }
    for variable in KEY_VARIABLES {
        if let Some(key) = std::env::var(variable).ok().filter(|key| !key.is_empty()) {
            keys = keys.and(&ApiKeys::new([key.as_str()]).context(variable)?);
        }
    }
    Ok(keys)
}
