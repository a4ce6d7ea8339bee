use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use longhaul_engine::{EngineError, Generate, KvPool, Loader, Precision};
use longhaul_server::{
    ApiKeys, BatchOptions, Batchable, Batched, Config, Cors, Defaults, Endpoint, Lifecycle, Limits, Log,
    LogContent, LogOptions, QueueLimits, Server, Serving, Tls, Tracer, error, info, warn,
};

use crate::args::{
    GenerationArgs, GenerationConfigArg, HttpArgs, JsonList, ModelArgs, OnOffArg, PolicyArg, ServeArgs,
};
use crate::exit::{self, UsageError};
use crate::systemd::Notifier;

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
    let mut loader = model(args).loader(Precision::Fastest)?;
    let batch = &args.batch;
    loader.device.kv_pool = match (batch.num_gpu_blocks_override, batch.kv_cache_memory_bytes) {
        (Some(blocks), _) => KvPool::Blocks(blocks),
        (None, Some(bytes)) => KvPool::Bytes(bytes),
        (None, None) => KvPool::Memory,
    };
    loader.device.max_sequences = NonZeroUsize::new(batch.max_num_seqs);
    loader.device.max_step_rows = batch.max_num_batched_tokens.and_then(NonZeroUsize::new);
    Ok(loader)
}

fn batch_options(args: &ServeArgs) -> BatchOptions {
    let (batch, queue) = (&args.batch, &args.queue);
    BatchOptions {
        queue: QueueLimits {
            requests: queue.max_num_queued_reqs,
            tokens: queue.max_num_queued_tokens.unwrap_or(usize::MAX),
            requests_per_key: queue.max_num_queued_reqs_per_key.unwrap_or(usize::MAX),
        },
        max_num_seqs: Some(batch.max_num_seqs),
        max_num_batched_tokens: batch.max_num_batched_tokens,
        max_mixed_prefill_rows: Some(batch.max_mixed_prefill_tokens),
        async_scheduling: match batch.async_scheduling {
            OnOffArg::Auto => None,
            OnOffArg::On => Some(true),
            OnOffArg::Off => Some(false),
        },
        speculation: batch.speculative_config,
        no_priorities: batch.scheduling_policy == PolicyArg::Fcfs,
        no_prefix_cache: batch.no_enable_prefix_caching,
        step_timeout: args.model.nodes.step_timeout,
        queued_events: Limits::default().queued_events,
    }
}

/// `longhaul serve`
pub fn run(args: &ServeArgs) -> Result<ExitCode> {
    let options = LogOptions {
        format: args.logs.log_format.into(),
        level: args.logs.log_level,
        requests: args.logs.requests_level(),
    };
    let log = Log::install(options, std::io::stderr()).context("the log cannot be written")?;
    // A panic is one request's affair, but its message is a line like the others, and waits for nobody either.
    std::panic::set_hook(Box::new(|panic| error(panic)));
    serve(args, &log).or_else(|reason| {
        // Also the last line is one of the log.
        let (message, code) = exit::explain(&reason);
        error(message);
        Ok(code)
    })
}

fn serve(args: &ServeArgs, log: &Log) -> Result<ExitCode> {
    let model = model(args);
    let loader = loader(args)?;
    let config = Config { log_drops: Some(log.dropped()), ..config(args)? };
    let server = Server::bind(endpoint(args)?, config)?;
    info(format_args!("listening on {}, loading {}", server.url(), model.model));
    args.warnings.iter().for_each(warn);
    if args.http.allow_unauthenticated {
        warn("--allow-unauthenticated: everybody who reaches this port may use it");
    }
    if args.logs.enable_log_requests || args.logs.enable_log_outputs {
        warn("what users and the model say is logged (--enable-log-requests, --enable-log-outputs)");
    }

    let notifier = Arc::new(Notifier::from_env().context("NOTIFY_SOCKET: cannot be sent to")?);
    notifier.status(&format!("loading {}", model.model));
    let told = Arc::clone(&notifier);
    let server = server.on_stop(move || told.stopping());
    let lifecycle = server.lifecycle();
    let batch = batch_options(args);
    let generation = args.generation.clone();
    let (sender, loaded) = sync_channel(1);
    std::thread::Builder::new().name("longhaul-load".into()).spawn(move || {
        let load = || load(&loader, &model.model, &lifecycle, &batch, &generation, &notifier);
        let result = catch_unwind(AssertUnwindSafe(load))
            .unwrap_or_else(|_| Err(anyhow!("loading the model panicked")));
        let failed = result.is_err();
        // First why, then that: whoever hears of the end finds the reason.
        let _ = sender.send(result);
        if failed {
            lifecycle.abandon();
        }
    })?;
    let drained = server.run()?;
    // A model that is still loading is left behind; the process ends.
    if let Ok(result) = loaded.try_recv() {
        result?;
    }
    if drained.cut > 0 {
        warn(format_args!("stopped; {} requests were cut when the time to finish was over", drained.cut));
        return Ok(ExitCode::from(exit::RESTART));
    }
    info("stopped; every request was finished");
    Ok(ExitCode::SUCCESS)
}

fn load(
    loader: &Loader,
    root: &str,
    lifecycle: &Lifecycle,
    batch: &BatchOptions,
    generation: &GenerationArgs,
    notifier: &Arc<Notifier>,
) -> Result<()> {
    let mut told = 0;
    let engine = loader.load(&mut |done, total| {
        lifecycle.progress(done, total);
        let percent = done * 100 / total.max(1);
        if percent > std::mem::replace(&mut told, percent) {
            notifier.status(&format!("loading {root}: {percent} %"));
        }
    })?;
    engine.notes().iter().for_each(|note| info(format_args!("note: {note}")));
    let (device, longest) = (engine.device().to_owned(), engine.max_model_len());
    let defaults = match generation.generation_config {
        GenerationConfigArg::Auto => Defaults::Checkpoint,
        GenerationConfigArg::Neutral | GenerationConfigArg::File(_) => Defaults::Neutral,
    };
    let mut batchable = Batchable::engine(engine, root.to_owned(), defaults);
    generation.apply(&mut batchable)?;
    let fits = batchable.model.max_model_len;
    if fits < longest {
        warn(format_args!(
            "the KV pool holds {fits} tokens, so that is the longest context, not the model's {longest}"
        ));
    }
    let losing = lifecycle.clone();
    let serving = Batched::start(batchable, batch, move |loss| losing.lose(loss))?;
    let serving = Arc::new(serving);
    lifecycle.ready(Arc::clone(&serving) as Arc<dyn Serving>);
    notifier.ready(&format!("serving {root} on {device}"));
    watch(notifier, serving)?;
    info(format_args!("ready: {root} on {device}"));
    Ok(())
}

/// Tells a service manager that listens for it, as long as the engine makes progress.
fn watch(notifier: &Arc<Notifier>, serving: Arc<dyn Serving>) -> Result<()> {
    let Some(period) = notifier.watchdog() else { return Ok(()) };
    let notifier = Arc::clone(notifier);
    std::thread::Builder::new().name("longhaul-watchdog".into()).spawn(move || {
        loop {
            match serving.health() {
                Ok(()) => notifier.alive(),
                Err(reason) => notifier.status(&reason),
            }
            std::thread::sleep(period);
        }
    })?;
    Ok(())
}

fn endpoint(args: &ServeArgs) -> Result<Endpoint> {
    match &args.http.uds {
        Some(path) => Ok(Endpoint::Unix(path.clone())),
        None => Ok(Endpoint::Tcp(address(&args.http.host, args.http.port)?)),
    }
}

fn tls(args: &ServeArgs) -> Result<Option<Tls>> {
    let Some(certificate) = &args.http.ssl_certfile else { return Ok(None) };
    let key = args.http.ssl_keyfile.as_ref().unwrap_or(certificate);
    Tls::from_files(certificate, key).map(Some).context("--ssl-certfile, --ssl-keyfile")
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    let unusable = |reason: String| UsageError(format!("--host {host}: {reason}"));
    let mut addresses = (host, port)
        .to_socket_addrs()
        .map_err(|e| unusable(format!("is no address of this machine: {e}")))?;
    Ok(addresses.next().ok_or_else(|| unusable("has no address".into()))?)
}

/// Names of `--served-model-name`, each once.
fn names(names: &[String]) -> Result<Vec<String>> {
    match names.iter().enumerate().find(|(index, name)| names.iter().take(*index).any(|other| other == *name))
    {
        Some((_, name)) => Err(UsageError(format!("--served-model-name: {name:?} is there twice")).into()),
        None => Ok(names.to_vec()),
    }
}

fn config(args: &ServeArgs) -> Result<Config> {
    let http = &args.http;
    let api_keys = keys(args)?;
    if args.batch.scheduling_policy == PolicyArg::Fcfs && api_keys.have_priorities() {
        let message =
            "--scheduling-policy fcfs: there is a key with a priority; use --scheduling-policy priority";
        return Err(UsageError(message.into()).into());
    }
    let some = |time: Duration| (!time.is_zero()).then_some(time);
    Ok(Config {
        served_model_names: names(&http.served_model_name)?,
        api_keys,
        allow_unauthenticated: http.allow_unauthenticated,
        tls: tls(args)?,
        root_path: http.root_path.clone(),
        cors: cors(http)?,
        template_variables: args
            .generation
            .default_chat_template_kwargs
            .clone()
            .map(|map| map.0)
            .unwrap_or_default(),
        tokens_as_ids: args.generation.return_tokens_as_token_ids,
        allowed_hosts: http.allowed_hosts.clone(),
        request_id_headers: http.enable_request_id_headers,
        force_include_usage: http.enable_force_include_usage,
        prompt_tokens_details: http.enable_prompt_tokens_details,
        sse_keep_alive: some(http.sse_keep_alive_interval),
        response_role: http.response_role.clone(),
        drain_delay: http.drain_delay,
        drain_timeout: http.shutdown_timeout,
        log: LogContent {
            requests: args.logs.enable_log_requests,
            outputs: args.logs.enable_log_outputs,
            max_len: args.logs.max_log_len,
            silent_routes: args.logs.disable_access_log_for_endpoints.clone(),
        },
        log_drops: None,
        tracer: tracer(args)?,
        limits: Limits {
            connections: http.max_connections,
            keep_alive: http.keep_alive_timeout,
            request_time: some(http.request_timeout),
            ..Limits::default()
        },
    })
}

fn cors(http: &HttpArgs) -> Result<Cors> {
    fn each<T: FromStr>(flag: &str, words: &JsonList) -> Result<Vec<T>> {
        let read = |word: &String| {
            word.parse().map_err(|_| UsageError(format!("{flag}: {word:?} cannot stand in a header")))
        };
        Ok(words.0.iter().map(read).collect::<Result<_, _>>()?)
    }
    let cors = Cors {
        origins: each("--allowed-origins", &http.allowed_origins)?,
        methods: each("--allowed-methods", &http.allowed_methods)?,
        headers: each("--allowed-headers", &http.allowed_headers)?,
        credentials: http.allow_credentials,
    };
    if cors.credentials && cors.origins.iter().any(|origin| origin == "*") {
        return Err(UsageError(
            "--allow-credentials: name the origins; browsers do not take it with \"*\"".into(),
        )
        .into());
    }
    Ok(cors)
}

fn tracer(args: &ServeArgs) -> Result<Option<Tracer>> {
    let Some(endpoint) = &args.logs.otlp_traces_endpoint else { return Ok(None) };
    let service = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "longhaul".into());
    Tracer::start(endpoint, &service).map(Some).context("--otlp-traces-endpoint")
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
