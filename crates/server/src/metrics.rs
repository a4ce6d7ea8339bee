//! `/metrics` in the Prometheus text format, under vLLM's names; what vLLM has no name for begins with `longhaul_`.
//!
//! Lock-free: a scrape reads atomics and one [`Snapshot`], so it may come as often as it likes.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::ledger::Ledger;
use crate::serving::{ModelInfo, PREEMPTIONS, STEP_ROWS, Snapshot, SpeculationCounts};
use crate::traces::Tracer;

const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const HTTP: &[f64] = &[0.1, 0.5, 1.0];

/// A histogram with fixed bounds.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    counts: Vec<AtomicU64>,
    /// Bits of an f64.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    pub(crate) fn record(&self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let add = |bits: u64| Some((f64::from_bits(bits) + value).to_bits());
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    pub(crate) fn seconds(&self, time: Duration) {
        self.record(time.as_secs_f64());
    }

    fn write(&self, out: &mut Exposition, name: &str, help: &str) {
        out.head(name, "histogram", help);
        self.series(out, name, "");
    }

    fn series(&self, out: &mut Exposition, name: &str, labels: &str) {
        let mut total = 0;
        let bounds = self.bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&self.counts) {
            total += count.load(Ordering::Relaxed);
            out.sample(&format!("{name}_bucket"), &format!("{labels}le=\"{bound}\""), total as f64);
        }
        let labels = labels.trim_end_matches(',');
        out.sample(&format!("{name}_sum"), labels, f64::from_bits(self.sum.load(Ordering::Relaxed)));
        out.sample(&format!("{name}_count"), labels, total as f64);
    }
}

/// What the server counts.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) cached_tokens: AtomicU64,
    pub(crate) generation_tokens: AtomicU64,
    pub(crate) numeric_failures: AtomicU64,
    pub(crate) panics: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) accept_errors: AtomicU64,
    pub(crate) handshake_errors: AtomicU64,
    /// Bytes of bodies that are being read or parsed, rounded up to KiB each.
    pub(crate) body_bytes: AtomicU64,
    /// Of the log.
    log_drops: Option<Arc<AtomicU64>>,
    tracer: Option<Tracer>,
    rejections: Mutex<BTreeMap<&'static str, u64>>,
    finished: Mutex<BTreeMap<&'static str, u64>>,
    http: Mutex<BTreeMap<HttpKey, Arc<HttpSeries>>>,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) per_output_token: Histogram,
    pub(crate) e2e: Histogram,
    pub(crate) queue: Histogram,
    pub(crate) inference: Histogram,
    pub(crate) prefill: Histogram,
    pub(crate) decode: Histogram,
    pub(crate) request_prompt_tokens: Histogram,
    pub(crate) request_generation_tokens: Histogram,
    pub(crate) params_max_tokens: Histogram,
    pub(crate) params_n: Histogram,
    pub(crate) prefill_computed: Histogram,
    pub(crate) most_generated: Histogram,
}

type HttpKey = (&'static str, String, u16);

#[derive(Debug)]
struct HttpSeries {
    count: AtomicU64,
    seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let counter = AtomicU64::default;
        Self {
            ledger: Arc::default(),
            prompt_tokens: counter(),
            cached_tokens: counter(),
            generation_tokens: counter(),
            numeric_failures: counter(),
            panics: counter(),
            connections: counter(),
            accept_errors: counter(),
            handshake_errors: counter(),
            body_bytes: counter(),
            log_drops: None,
            tracer: None,
            rejections: Mutex::default(),
            finished: Mutex::default(),
            http: Mutex::default(),
            time_to_first_token: Histogram::new(TTFT),
            inter_token: Histogram::new(PER_TOKEN),
            per_output_token: Histogram::new(PER_TOKEN),
            e2e: Histogram::new(REQUEST),
            queue: Histogram::new(REQUEST),
            inference: Histogram::new(REQUEST),
            prefill: Histogram::new(REQUEST),
            decode: Histogram::new(REQUEST),
            request_prompt_tokens: Histogram::new(TOKENS),
            request_generation_tokens: Histogram::new(TOKENS),
            params_max_tokens: Histogram::new(TOKENS),
            params_n: Histogram::new(CHOICES),
            prefill_computed: Histogram::new(TOKENS),
            most_generated: Histogram::new(TOKENS),
        }
    }
}

impl Metrics {
    /// With the lines that the log drops, and the tracer that drops spans.
    pub(crate) fn new(log_drops: Option<Arc<AtomicU64>>, tracer: Option<Tracer>) -> Self {
        Self { log_drops, tracer, ..Self::default() }
    }

    /// A request was refused for `reason`.
    pub(crate) fn rejected(&self, reason: &'static str) {
        *lock(&self.rejections).entry(reason).or_default() += 1;
    }

    /// A choice ended with `finish_reason`.
    pub(crate) fn choice_finished(&self, finish_reason: &'static str) {
        *lock(&self.finished).entry(finish_reason).or_default() += 1;
    }

    /// A response's head was sent. `route` is a route's pattern, never a client's path.
    pub(crate) fn http(&self, route: &'static str, method: &str, status: u16, time: Duration) {
        let key = (route, method.to_owned(), status);
        let series = Arc::clone(lock(&self.http).entry(key).or_insert_with(|| {
            Arc::new(HttpSeries { count: AtomicU64::new(0), seconds: Histogram::new(HTTP) })
        }));
        series.count.fetch_add(1, Ordering::Relaxed);
        series.seconds.seconds(time);
    }

    /// The page. Before the model is loaded it has what concerns the server alone.
    pub(crate) fn render(&self, served: Option<(&ModelInfo, &str, Snapshot)>, started: Instant) -> String {
        let name = served.as_ref().map(|(_, name, _)| *name).unwrap_or_default();
        let mut out = Exposition {
            text: String::with_capacity(16 << 10),
            labels: format!("model_name=\"{}\",engine=\"0\"", escape(name)),
        };
        if let Some((model, _, snapshot)) = served {
            engine(&mut out, model, snapshot);
        }
        self.tokens(&mut out);
        self.requests(&mut out);
        self.server(&mut out, started);
        out.text
    }

    fn tokens(&self, out: &mut Exposition) {
        out.counter("vllm:prompt_tokens", "Prompt tokens of started requests.", load(&self.prompt_tokens));
        out.counter(
            "vllm:prompt_tokens_cached",
            "Prompt tokens found in the prefix cache.",
            load(&self.cached_tokens),
        );
        out.head(
            "vllm:prompt_tokens_by_source_total",
            "counter",
            "Prompt tokens by where their KV came from.",
        );
        let (all, cached) = (load(&self.prompt_tokens), load(&self.cached_tokens));
        for (source, count) in [
            ("local_compute", all.saturating_sub(cached)),
            ("local_cache_hit", cached),
            ("external_kv_transfer", 0),
        ] {
            let label = format!("source=\"{source}\"");
            out.sample("vllm:prompt_tokens_by_source_total", &label, count as f64);
        }
        out.counter("vllm:generation_tokens", "Generated tokens.", load(&self.generation_tokens));
        out.counter(
            "vllm:corrupted_requests",
            "Requests ended because their logits were not finite.",
            load(&self.numeric_failures),
        );
    }

    fn requests(&self, out: &mut Exposition) {
        let labelled =
            |out: &mut Exposition, name: &str, help: &str, label: &str, counts: Vec<(&str, u64)>| {
                out.head(&format!("{name}_total"), "counter", help);
                for (value, count) in counts {
                    out.sample(&format!("{name}_total"), &format!("{label}=\"{value}\""), count as f64);
                }
            };
        let of = |map: &Mutex<BTreeMap<&'static str, u64>>, always: &[&'static str]| -> Vec<(&str, u64)> {
            let mut counts = lock(map).clone();
            always.iter().for_each(|key| {
                counts.entry(key).or_default();
            });
            counts.into_iter().collect()
        };
        labelled(
            out,
            "vllm:request_success",
            "Choices that ended, by finish reason.",
            "finished_reason",
            of(&self.finished, &["stop", "length", "abort", "error"]),
        );
        labelled(
            out,
            "vllm:admission_rejections",
            "Requests refused at admission, by reason.",
            "reason",
            of(&self.rejections, &["saturated", "quota", "draining"]),
        );
        out.counter("longhaul_requests_received", "Requests to the API.", self.ledger.received());
        labelled(
            out,
            "longhaul_requests_finished",
            "Requests to the API by their one outcome.",
            "outcome",
            self.ledger.finished().map(|(outcome, count)| (outcome.label(), count)).collect(),
        );
        let histograms: [(&Histogram, &str, &str); 14] = [
            (
                &self.time_to_first_token,
                "vllm:time_to_first_token_seconds",
                "From arrival to the first token.",
            ),
            (&self.inter_token, "vllm:inter_token_latency_seconds", "Between tokens of a choice."),
            (
                &self.per_output_token,
                "vllm:request_time_per_output_token_seconds",
                "Mean time of a token after the first, by choice.",
            ),
            (&self.e2e, "vllm:e2e_request_latency_seconds", "From arrival to the last token."),
            (&self.queue, "vllm:request_queue_time_seconds", "From submission to the start of computing."),
            (
                &self.inference,
                "vllm:request_inference_time_seconds",
                "From the start of computing to the last token.",
            ),
            (
                &self.prefill,
                "vllm:request_prefill_time_seconds",
                "From the start of computing to the first token.",
            ),
            (&self.decode, "vllm:request_decode_time_seconds", "From the first token to the last."),
            (&self.request_prompt_tokens, "vllm:request_prompt_tokens", "Prompt tokens of a request."),
            (
                &self.request_generation_tokens,
                "vllm:request_generation_tokens",
                "Generated tokens of a choice.",
            ),
            (&self.params_max_tokens, "vllm:request_params_max_tokens", "max_tokens of a request."),
            (&self.params_n, "vllm:request_params_n", "n of a request."),
            (
                &self.prefill_computed,
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens of a request that were not in the prefix cache.",
            ),
            (
                &self.most_generated,
                "vllm:request_max_num_generation_tokens",
                "Generated tokens of a prompt's longest choice.",
            ),
        ];
        for (histogram, name, help) in histograms {
            histogram.write(out, name, help);
        }
    }

    fn server(&self, out: &mut Exposition, started: Instant) {
        out.labels.clear();
        let http: Vec<(HttpKey, Arc<HttpSeries>)> =
            lock(&self.http).iter().map(|(key, series)| (key.clone(), Arc::clone(series))).collect();
        let labels = |(route, method, status): &HttpKey| {
            format!(
                "handler=\"{route}\",method=\"{}\",status=\"{}xx\",code=\"{status}\"",
                escape(method),
                status / 100
            )
        };
        out.head("http_requests_total", "counter", "Requests by route, method and status.");
        for (key, series) in &http {
            out.sample("http_requests_total", &labels(key), load(&series.count) as f64);
        }
        out.head("http_request_duration_seconds", "histogram", "Time until the response's head was sent.");
        for (key, series) in &http {
            series.seconds.series(out, "http_request_duration_seconds", &format!("{},", labels(key)));
        }
        out.gauge("longhaul_connections", "Open connections.", load(&self.connections) as f64);
        out.counter(
            "longhaul_accept_errors",
            "Connections that could not be accepted.",
            load(&self.accept_errors),
        );
        out.counter(
            "longhaul_handshake_errors",
            "Connections that failed or took too long in the handshake of TLS.",
            load(&self.handshake_errors),
        );
        out.gauge("longhaul_body_bytes", "Bodies being read or parsed.", load(&self.body_bytes) as f64);
        out.counter(
            "longhaul_log_lines_dropped",
            "Lines of the log for which there was no room, because nobody read it.",
            self.log_drops.as_ref().map_or(0, |drops| load(drops)),
        );
        out.counter(
            "longhaul_trace_spans_dropped",
            "Spans that their collector did not take.",
            self.tracer.as_ref().map_or(0, Tracer::dropped),
        );
        out.counter("longhaul_panics", "Handlers that panicked.", load(&self.panics));
        out.gauge("longhaul_uptime_seconds", "Since the port was bound.", started.elapsed().as_secs_f64());
    }
}

fn engine(out: &mut Exposition, model: &ModelInfo, snapshot: Snapshot) {
    let (running, waiting) = (snapshot.running as f64, snapshot.waiting as f64);
    out.gauge("vllm:num_requests_running", "Requests being computed.", running);
    out.gauge("vllm:num_requests_waiting", "Requests in the queue.", waiting);
    out.head("vllm:num_requests_waiting_by_reason", "gauge", "Requests in the queue, by reason.");
    out.sample("vllm:num_requests_waiting_by_reason", "reason=\"capacity\"", waiting);
    out.gauge("vllm:kv_cache_usage_perc", "Fraction of KV blocks in use.", snapshot.kv_cache_usage);
    out.gauge("vllm:gpu_cache_usage_perc", "The same under its old name.", snapshot.kv_cache_usage);
    out.head("vllm:cache_config_info", "gauge", "The KV pool.");
    let pool = format!("block_size=\"{}\",num_gpu_blocks=\"{}\"", model.block_size, model.kv_blocks);
    out.sample("vllm:cache_config_info", &pool, 1.0);
    out.counter("vllm:num_preemptions", "Requests put back for want of blocks.", snapshot.preemptions);
    out.counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", snapshot.prefix_queries);
    out.counter("vllm:prefix_cache_hits", "Prompt tokens found.", snapshot.prefix_hits);
    out.counter("vllm:gpu_prefix_cache_queries", "The same under its old name.", snapshot.prefix_queries);
    out.counter("vllm:gpu_prefix_cache_hits", "The same under its old name.", snapshot.prefix_hits);
    out.buckets(
        "vllm:iteration_tokens_total",
        "Rows of a step: tokens that decode and tokens of prompts.",
        &STEP_ROWS,
        &snapshot.step_rows,
        snapshot.step_rows_sum,
    );
    out.buckets(
        "vllm:request_num_preemptions",
        "Times that a request gave up its blocks for others.",
        &PREEMPTIONS,
        &snapshot.request_preemptions,
        snapshot.request_preemptions_sum,
    );
    out.head("vllm:engine_sleep_state", "gauge", "1 for the state of the weights.");
    for (state, on) in [("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)] {
        out.sample("vllm:engine_sleep_state", &format!("sleep_state=\"{state}\""), on);
    }
    out.counter("longhaul_steps", "Steps computed.", snapshot.steps);
    if let Some(counts) = &snapshot.speculation {
        speculation(out, counts);
    }
}

fn speculation(out: &mut Exposition, counts: &SpeculationCounts) {
    out.counter("vllm:spec_decode_num_drafts", "Drafts of speculative decoding.", counts.drafts);
    out.counter("vllm:spec_decode_num_draft_tokens", "Tokens of drafts.", counts.draft_tokens);
    out.counter(
        "vllm:spec_decode_num_accepted_tokens",
        "Drafted tokens that were drawn.",
        counts.accepted_tokens,
    );
    let name = "vllm:spec_decode_num_accepted_tokens_per_pos_total";
    out.head(name, "counter", "Drafted tokens that were drawn, by their place in the draft.");
    for (position, count) in
        counts.accepted_per_position.iter().take(counts.num_speculative_tokens).enumerate()
    {
        out.sample(name, &format!("position=\"{position}\""), *count as f64);
    }
}

/// The text, and the labels that every sample carries.
struct Exposition {
    text: String,
    labels: String,
}

impl Exposition {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let comma = if self.labels.is_empty() || labels.is_empty() { "" } else { "," };
        let (common, text) = (&self.labels, &mut self.text);
        let _ = if common.is_empty() && labels.is_empty() {
            writeln!(text, "{name} {value}")
        } else {
            writeln!(text, "{name}{{{common}{comma}{labels}}} {value}")
        };
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, "gauge", help);
        self.sample(name, "", value);
    }

    /// A histogram that was counted elsewhere: `counts` has one more than `bounds`.
    fn buckets(&mut self, name: &str, help: &str, bounds: &[u64], counts: &[u64], sum: u64) {
        self.head(name, "histogram", help);
        let mut all = 0;
        let bounds = bounds.iter().map(u64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(counts) {
            all += count;
            self.sample(&format!("{name}_bucket"), &format!("le=\"{bound}\""), all as f64);
        }
        self.sample(&format!("{name}_sum"), "", sum as f64);
        self.sample(&format!("{name}_count"), "", all as f64);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let name = format!("{name}_total");
        self.head(&name, "counter", help);
        self.sample(&name, "", value as f64);
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// A counter map is whole after every statement, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A label's value.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_cumulative_and_its_bounds_are_inclusive() {
        let histogram = Histogram::new(&[1.0, 2.5]);
        [0.5, 1.0, 2.0, 9.0].iter().for_each(|v| histogram.record(*v));
        let mut out = Exposition { text: String::new(), labels: "model_name=\"m\"".into() };
        histogram.write(&mut out, "h", "Help.");
        assert_eq!(
            out.text,
            "# HELP h Help.\n# TYPE h histogram\n\
             h_bucket{model_name=\"m\",le=\"1\"} 2\nh_bucket{model_name=\"m\",le=\"2.5\"} 3\n\
             h_bucket{model_name=\"m\",le=\"+Inf\"} 4\nh_sum{model_name=\"m\"} 12.5\nh_count{model_name=\"m\"} 4\n"
        );
    }

    #[test]
    fn every_sample_is_well_formed_and_every_name_is_declared_once() {
        let metrics = Metrics::default();
        metrics.http("/v1/models", "GET", 200, Duration::from_millis(3));
        metrics.http("/v1/models", "X\"\n", 405, Duration::ZERO);
        metrics.rejected("saturated");
        let page = metrics.render(None, Instant::now());
        let mut declared = std::collections::HashSet::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let name = rest.split(' ').next().unwrap();
                assert!(declared.insert(name.to_owned()), "{name} is declared twice");
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').unwrap();
                assert!(value.parse::<f64>().is_ok(), "{line}");
                let name = series.split('{').next().unwrap();
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s));
                assert!(declared.contains(name) || base.is_some_and(|b| declared.contains(b)), "{line}");
            }
        }
        assert!(page.contains(
            "vllm:admission_rejections_total{model_name=\"\",engine=\"0\",reason=\"saturated\"} 1\n"
        ));
        assert!(page.contains("method=\"X\\\"\\n\""), "{page}");
    }
}
