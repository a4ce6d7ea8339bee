//! Flags of `vllm serve` that are not ours, and what becomes of each.

/// How many values follow a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// It is one itself; `--no-…` is its opposite.
    Nothing,
    /// One.
    One,
    /// Those up to the next flag.
    Many,
}

/// What becomes of a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It has no effect here, which is said with the reason.
    Ignored(&'static str),
    /// Values that ask for nothing we do not do; others are refused with the reason.
    Only(&'static [&'static str], &'static str),
    /// It asks for something we do not do.
    Refused(&'static str),
}

/// A flag of vLLM that is not one of ours.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// Without `--`.
    pub name: &'static str,
    /// Its values.
    pub takes: Takes,
    /// What becomes of it.
    pub fate: Fate,
}

const fn flag(name: &'static str, takes: Takes, fate: Fate) -> Flag {
    Flag { name, takes, fate }
}

use Fate::{Ignored, Only, Refused};
use Takes::{Many, Nothing, One};

const NO_TORCH: &str = "it tunes torch, which is not used";
const NO_LORA: &str = "adapters are not supported; serve a checkpoint with the adapter merged in";
const NO_QUANTIZATION: &str =
    "quantised checkpoints are not supported; serve one in bfloat16, float16 or float32";
const NO_PIPELINE: &str = "the model is dealt over devices by --tp only";
const NO_REPLICAS: &str = "one process serves one copy of the model; start several behind a load balancer";
const NO_MEDIA: &str = "only text is served";
const NO_OFFLOAD: &str =
    "weights and KV cache stay on the device; give fewer --num-gpu-blocks-override or more --tp";
const ONE_PROCESS: &str = "the front end is one process with as many threads as it needs";

/// Every flag of `vllm serve` that is not one of ours.
pub static FLAGS: &[Flag] = &[
    // Front end.
    flag(
        "api-key",
        Many,
        Refused(
            "keys on a command line can be read by everybody on the machine; use --api-key-file or VLLM_API_KEY",
        ),
    ),
    flag("api-server-count", One, Ignored(ONE_PROCESS)),
    flag("disable-frontend-multiprocessing", Nothing, Ignored(ONE_PROCESS)),
    flag("headless", Nothing, Refused("nodes other than the first are told so by --node-rank")),
    flag("grpc", Nothing, Refused("only HTTP is served")),
    flag("middleware", Many, Refused("there is no Python to run it; put a proxy in front")),
    flag("ssl-ca-certs", One, Refused("certificates of clients are not asked for; use API keys")),
    flag("ssl-cert-reqs", One, Only(&["0"], "certificates of clients are not asked for; use API keys")),
    flag(
        "ssl-ciphers",
        One,
        Refused("the ciphers are those of TLS 1.2 and 1.3 that are thought safe; leave it out"),
    ),
    flag(
        "enable-ssl-refresh",
        Nothing,
        Refused("certificates are read at the start; restart to change them"),
    ),
    flag("h11-max-incomplete-event-size", One, Ignored("heads have 64 KiB")),
    flag("h11-max-header-count", One, Ignored("heads have 64 headers")),
    flag("disable-fastapi-docs", Nothing, Ignored("there are no documentation pages but /openapi.json")),
    flag("enable-offline-docs", Nothing, Ignored("there are no documentation pages but /openapi.json")),
    flag("enable-server-load-tracking", Nothing, Ignored("/load always tells")),
    flag(
        "enable-tokenizer-info-endpoint",
        Nothing,
        Refused("there is no such route; /tokenize and /detokenize are always there"),
    ),
    flag(
        "trust-request-chat-template",
        Nothing,
        Refused("templates of requests are never run; use --chat-template"),
    ),
    flag(
        "chat-template-content-format",
        One,
        Only(&["auto", "string"], "templates of this family take contents as text"),
    ),
    flag("enable-auto-tool-choice", Nothing, Ignored("calls are parsed whenever a chat brings tools")),
    flag("exclude-tools-when-tool-choice-none", Nothing, Ignored("that is so")),
    flag(
        "tool-parser-plugin",
        One,
        Refused("there is no Python to run it; --tool-call-parser hermes is what the family speaks"),
    ),
    flag("tool-server", One, Refused("tools are called by the client")),
    flag(
        "reasoning-parser",
        One,
        Only(&[""], "reasoning is part of the text; the family's templates have no channel for it"),
    ),
    flag("reasoning-parser-plugin", One, Refused("there is no Python to run it")),
    flag("lora-modules", Many, Refused(NO_LORA)),
    flag("enable-lora", Nothing, Refused(NO_LORA)),
    flag("enable-lora-bias", Nothing, Refused(NO_LORA)),
    flag("fully-sharded-loras", Nothing, Refused(NO_LORA)),
    flag("max-loras", One, Ignored("there are no adapters")),
    flag("max-lora-rank", One, Ignored("there are no adapters")),
    flag("max-cpu-loras", One, Ignored("there are no adapters")),
    flag("lora-dtype", One, Ignored("there are no adapters")),
    flag("lora-extra-vocab-size", One, Ignored("there are no adapters")),
    flag("enable-sleep-mode", Nothing, Refused("weights are never given back; stop the server")),
    flag("disable-log-stats", Nothing, Ignored("figures are at /metrics only")),
    flag("disable-log-requests", Nothing, Ignored("prompts are logged with --enable-log-requests only")),
    flag("collect-detailed-traces", Many, Ignored("spans have the times of queue, prefill and decode")),
    flag("show-hidden-metrics-for-version", One, Ignored("old names of metrics are always there")),
    flag("kv-cache-metrics", Nothing, Ignored("what there is at /metrics is always there")),
    flag("fingerprint-mode", One, Refused("answers have no fingerprint")),
    // Model.
    flag("task", One, Only(&["auto", "generate"], "text is generated, nothing else")),
    flag("runner", One, Only(&["auto", "generate"], "text is generated, nothing else")),
    flag("convert", One, Only(&["auto", "none"], "text is generated, nothing else")),
    flag("model-impl", One, Only(&["auto", "vllm"], "there is one implementation of the models")),
    flag(
        "tokenizer",
        One,
        Refused("the tokenizer is the checkpoint's; put its tokenizer.json into the model's directory"),
    ),
    flag("tokenizer-mode", One, Only(&["auto", "hf"], "there is one tokenizer, which is the fast one")),
    flag("skip-tokenizer-init", Nothing, Refused("a checkpoint without tokenizer.json is served with ids")),
    flag("revision", One, Only(&["main"], "the main revision is loaded; give another as a directory")),
    flag("code-revision", One, Ignored("no code of a checkpoint is run")),
    flag(
        "tokenizer-revision",
        One,
        Only(&["main"], "the main revision is loaded; give another as a directory"),
    ),
    flag("trust-remote-code", Nothing, Ignored("no code of a checkpoint is ever run")),
    flag("hf-config-path", One, Refused("config.json is read from the model's directory")),
    flag("hf-overrides", One, Only(&["{}"], "change config.json, or use --long-context and --max-model-len")),
    flag(
        "hf-token",
        One,
        Refused("a secret on a command line can be read by everybody on the machine; use HF_TOKEN"),
    ),
    flag("config-format", One, Only(&["auto", "hf"], "configs are those of transformers")),
    flag("allowed-local-media-path", One, Refused(NO_MEDIA)),
    flag("allowed-media-domains", Many, Refused(NO_MEDIA)),
    flag("limit-mm-per-prompt", One, Ignored(NO_MEDIA)),
    flag("mm-processor-kwargs", One, Refused(NO_MEDIA)),
    flag("mm-processor-cache-gb", One, Ignored(NO_MEDIA)),
    flag("language-model-only", Nothing, Ignored(NO_MEDIA)),
    flag("quantization", One, Only(&["", "none", "None", "null"], NO_QUANTIZATION)),
    flag("download-dir", One, Refused("checkpoints lie where HF_HOME says")),
    flag(
        "model-loader-extra-config",
        One,
        Only(&["{}"], "safetensors are read by as many threads as there are cores"),
    ),
    flag("ignore-patterns", Many, Ignored("only safetensors and the JSON beside them are read")),
    flag("use-tqdm-on-load", Nothing, Ignored("progress is at /ready")),
    flag("safetensors-load-strategy", One, Ignored("each rank reads what it needs")),
    flag("pt-load-map-location", One, Ignored(NO_TORCH)),
    flag("seed", One, Ignored("requests draw by their own `seed`, or by a random one")),
    flag("logprobs-mode", One, Only(&["raw_logprobs"], "log probabilities are those of the raw logits")),
    flag(
        "disable-sliding-window",
        Nothing,
        Ignored("a window that would cut attention is refused when the checkpoint loads"),
    ),
    flag(
        "disable-cascade-attn",
        Nothing,
        Ignored("there is one attention, which gives each row the same bits in every batch"),
    ),
    flag("enable-prompt-embeds", Nothing, Refused("prompts are text or ids")),
    flag("override-attention-dtype", One, Refused("attention computes in float32")),
    flag("io-processor-plugin", One, Refused("there is no Python to run it")),
    flag("logits-processors", Many, Refused("there is no Python to run it")),
    flag("pooler-config", One, Refused("text is generated, nothing else")),
    flag("override-pooler-config", One, Refused("text is generated, nothing else")),
    // Devices and ranks.
    flag("pipeline-parallel-size", One, Only(&["1"], NO_PIPELINE)),
    flag("data-parallel-size", One, Only(&["1"], NO_REPLICAS)),
    flag("data-parallel-size-local", One, Only(&["1"], NO_REPLICAS)),
    flag("data-parallel-rank", One, Only(&["0"], NO_REPLICAS)),
    flag("data-parallel-start-rank", One, Only(&["0"], NO_REPLICAS)),
    flag("data-parallel-address", One, Ignored(NO_REPLICAS)),
    flag("data-parallel-rpc-port", One, Ignored(NO_REPLICAS)),
    flag("data-parallel-backend", One, Ignored(NO_REPLICAS)),
    flag("data-parallel-external-lb", Nothing, Refused(NO_REPLICAS)),
    flag("data-parallel-hybrid-lb", Nothing, Refused(NO_REPLICAS)),
    flag("decode-context-parallel-size", One, Only(&["1"], "ranks share heads, not the context; use --tp")),
    flag("prefill-context-parallel-size", One, Only(&["1"], "ranks share heads, not the context; use --tp")),
    flag("enable-eplb", Nothing, Refused("experts stay where they are dealt")),
    flag("eplb-config", One, Ignored("experts stay where they are dealt")),
    flag("expert-placement-strategy", One, Only(&["linear"], "experts are dealt in their order")),
    flag("all2all-backend", One, Ignored("ranks sum what their experts give")),
    flag(
        "distributed-executor-backend",
        One,
        Ignored("ranks are threads, and a process for each of several nodes"),
    ),
    flag("disable-custom-all-reduce", Nothing, Ignored("--all-reduce says how ranks sum")),
    flag("disable-nccl-for-dp-synchronization", Nothing, Ignored(NO_REPLICAS)),
    flag("enable-dbo", Nothing, Refused("see --overlap-prefill-rows")),
    flag("dbo-decode-token-threshold", One, Ignored("see --overlap-prefill-rows")),
    flag("dbo-prefill-token-threshold", One, Ignored("see --overlap-prefill-rows")),
    flag("max-parallel-loading-workers", One, Ignored("ranks load at once, each its shard")),
    flag("ray-workers-use-nsight", Nothing, Ignored("there is no Ray")),
    flag("worker-cls", One, Refused("there is no Python to run it")),
    flag("worker-extension-cls", One, Refused("there is no Python to run it")),
    // KV cache.
    flag("block-size", One, Ignored("blocks have the size that suits the device's kernels")),
    flag(
        "prefix-caching-hash-algo",
        One,
        Only(&["sha256", "sha256_cbor", "builtin"], "prefixes are hashed by SHA-256"),
    ),
    flag("swap-space", One, Ignored("what is preempted is computed again")),
    flag("cpu-offload-gb", One, Only(&["0", "0.0"], NO_OFFLOAD)),
    flag("kv-offloading-size", One, Only(&["0", "0.0"], NO_OFFLOAD)),
    flag("kv-offloading-backend", One, Ignored("nothing is offloaded")),
    flag("kv-transfer-config", One, Refused("KV caches are not sent to other servers")),
    flag("kv-events-config", One, Only(&["{}"], "events of the KV cache are not published")),
    flag("kv-sharing-fast-prefill", Nothing, Refused("layers of this family do not share KV")),
    flag("calculate-kv-scales", Nothing, Refused("the scales of an fp8 KV cache are 1")),
    flag("mamba-cache-dtype", One, Ignored("the family has no such layers")),
    flag("mamba-ssm-cache-dtype", One, Ignored("the family has no such layers")),
    flag("mamba-block-size", One, Ignored("the family has no such layers")),
    // Scheduling.
    flag("enable-chunked-prefill", Nothing, Ignored("prompts are always computed in chunks")),
    flag(
        "max-num-partial-prefills",
        One,
        Ignored("--max-mixed-prefill-tokens says how much of prompts goes into a step"),
    ),
    flag(
        "max-long-partial-prefills",
        One,
        Ignored("--max-mixed-prefill-tokens says how much of prompts goes into a step"),
    ),
    flag(
        "long-prefill-token-threshold",
        One,
        Only(&["0"], "--max-mixed-prefill-tokens says how much of prompts goes into a step"),
    ),
    flag("num-scheduler-steps", One, Only(&["1"], "steps are scheduled one by one; see --async-scheduling")),
    flag("num-lookahead-slots", One, Ignored("--speculative-config says how far is guessed")),
    flag("scheduler-delay-factor", One, Only(&["0", "0.0"], "nothing waits for more to come")),
    flag("preemption-mode", One, Only(&["recompute"], "what is preempted is computed again")),
    flag("scheduler-cls", One, Refused("there is no Python to run it")),
    flag("stream-interval", One, Only(&["1"], "every token is sent when it is there")),
    flag("watermark", One, Only(&["0", "0.0"], "no block of the KV cache is held back")),
    flag("prefill-schedule-interval", One, Only(&["1"], "prompts are taken up at every step")),
    flag("disable-hybrid-kv-cache-manager", Nothing, Ignored("all layers of the family cache alike")),
    flag(
        "structured-outputs-config",
        One,
        Only(&["{}"], "there is one engine for structured output; leave it out"),
    ),
    flag("guided-decoding-backend", One, Ignored("there is one engine for structured output")),
    // Torch.
    flag("compilation-config", One, Ignored(NO_TORCH)),
    flag("cudagraph-capture-sizes", Many, Ignored("graphs are recorded for the sizes that come")),
    flag("max-cudagraph-capture-size", One, Ignored("graphs are recorded for the sizes that come")),
    flag("max-seq-len-to-capture", One, Ignored("graphs are recorded for the sizes that come")),
    flag("cuda-graph-sizes", Many, Ignored("graphs are recorded for the sizes that come")),
    flag("attention-backend", One, Ignored("--kernels says which kernels run")),
    flag("attention-config", One, Ignored("--kernels says which kernels run")),
    flag("kernel-config", One, Ignored("--kernels says which kernels run")),
    flag("moe-backend", One, Ignored("--kernels says which kernels run")),
    flag("optimization-level", One, Ignored(NO_TORCH)),
    flag("profiler-config", One, Refused("there are no profiler routes; use Nsight Systems")),
    flag("additional-config", One, Only(&["{}"], "there are no plug-ins")),
];
