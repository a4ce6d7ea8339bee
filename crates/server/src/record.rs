//! What is known of a request when it is over: a line of the log, a span of a trace.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use crate::ledger::Outcome;
use crate::log::{Level, event, harmless, request};
use crate::pipeline::Usage;
use crate::quota::{Lease, Quota};
use crate::server::App;
use crate::serving::{Namespace, Submission};
use crate::traces::{Attribute, Parent, Span};

/// Status of a request whose client left before the answer began, as proxies write it.
const CLIENT_LEFT: u16 = 499;

/// A request from its arrival on. It is recorded when the last one who knows it is gone: the answer's body at the latest.
pub(crate) struct Record {
    app: Arc<App>,
    id: String,
    method: String,
    /// A route's pattern, never a client's path.
    route: &'static str,
    parent: Option<Parent>,
    arrived: Instant,
    began: SystemTime,
    facts: Mutex<Facts>,
}

#[derive(Default)]
struct Facts {
    status: Option<u16>,
    key: Option<Arc<str>>,
    lease: Option<Lease>,
    outcome: Option<Outcome>,
    model: Option<String>,
    asked: Option<Asked>,
    usage: Option<Usage>,
    times: Times,
    outputs: Vec<String>,
}

/// What the request asked for.
#[derive(Debug, Clone, Copy)]
struct Asked {
    n: u32,
    max_tokens: usize,
    temperature: f32,
    top_p: f32,
}

/// Since the request's arrival.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Times {
    /// It left the queue.
    pub(crate) started: Option<Duration>,
    /// Its first token.
    pub(crate) first: Option<Duration>,
}

impl Record {
    pub(crate) fn new(
        app: Arc<App>,
        id: String,
        method: &str,
        route: &'static str,
        parent: Option<Parent>,
        arrived: Instant,
    ) -> Arc<Self> {
        Arc::new(Self {
            app,
            id,
            method: method.to_owned(),
            route,
            parent,
            arrived,
            began: SystemTime::now(),
            facts: Mutex::default(),
        })
    }

    /// Facts are whole after every statement, so a panic elsewhere does not spoil them.
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose it is: by the name that the key has, else by what is derived from it.
    pub(crate) fn caller(&self, namespace: &Namespace, quota: Option<&Quota>) {
        let name = quota.and_then(|quota| quota.terms.name.as_deref());
        self.facts().key = name.map(Into::into).or_else(|| namespace.0.clone());
    }

    /// Holds the request's place among those of its key, and charges what it cost in the end.
    pub(crate) fn hold(&self, lease: Lease) {
        self.facts().lease = Some(lease);
    }

    pub(crate) fn status(&self, status: u16) {
        self.facts().status = Some(status);
    }

    pub(crate) fn outcome(&self, outcome: Outcome) {
        self.facts().outcome = Some(outcome);
    }

    pub(crate) fn model(&self, name: &str) {
        self.facts().model = Some(harmless(name, 200));
    }

    /// It goes to the engine.
    pub(crate) fn submitted(&self, submission: &Submission) {
        let params = &submission.sampling.params;
        self.facts().asked.get_or_insert(Asked {
            n: submission.n,
            max_tokens: submission.max_tokens,
            temperature: params.temperature,
            top_p: params.top_p,
        });
        let log = &self.app.config.log;
        if log.requests {
            // A token is a byte at least, so these ids have all the text that is shown.
            let shown = submission.prompt.get(..log.max_len).unwrap_or(&submission.prompt);
            let serving = self.app.lifecycle.serving();
            let tokenizer = serving.as_ref().and_then(|serving| serving.model().tokenizer.as_ref());
            let text = tokenizer.map(|tokenizer| tokenizer.decode(shown, false)).unwrap_or_default();
            let mut text = harmless(&text, log.max_len);
            if shown.len() < submission.prompt.len() && !text.ends_with('…') {
                text.push('…');
            }
            event(
                Level::Info,
                "request submitted",
                [
                    ("id", json!(submission.id)),
                    ("prompt", json!(text)),
                    ("prompt_tokens", json!(submission.prompt.len())),
                    ("n", json!(submission.n)),
                    ("max_tokens", json!(submission.max_tokens)),
                    ("temperature", json!(params.temperature)),
                    ("top_p", json!(params.top_p)),
                    ("top_k", json!(params.top_k)),
                    ("seed", json!(params.seed)),
                ],
            );
        }
    }

    /// Whether [`Self::said`] is of use.
    pub(crate) fn wants_outputs(&self) -> bool {
        self.app.config.log.outputs
    }

    /// Text of choice `index`.
    pub(crate) fn said(&self, index: usize, text: &str) {
        let limit = self.app.config.log.max_len;
        let mut facts = self.facts();
        if facts.outputs.len() <= index {
            facts.outputs.resize(index + 1, String::new());
        }
        // One character more than is shown tells that there was more.
        if let Some(output) = facts.outputs.get_mut(index)
            && output.chars().count() <= limit
        {
            output.extend(text.chars().take(limit + 1));
        }
    }

    /// What came of it so far.
    pub(crate) fn progress(&self, usage: Usage, times: Times) {
        let mut facts = self.facts();
        facts.usage = Some(usage);
        facts.times = times;
    }

    fn log(&self, facts: &Facts, total: Duration) {
        let config = &self.app.config.log;
        for (choice, output) in facts.outputs.iter().enumerate() {
            let fields = [
                ("id", json!(self.id)),
                ("choice", json!(choice)),
                ("output", json!(harmless(output, config.max_len))),
            ];
            event(Level::Info, "request answered", fields);
        }
        if config.silent_routes.iter().any(|route| route == self.route) {
            return;
        }
        let milliseconds = |time: Duration| (time.as_secs_f64() * 1e5).round() / 1e2;
        // Probes would drown the rest.
        let level = if crate::router::is_counted(self.route) { Level::Info } else { Level::Debug };
        let fields = [
            ("id", json!(self.id)),
            ("method", json!(self.method)),
            ("route", json!(self.route)),
            ("status", json!(facts.status.unwrap_or(CLIENT_LEFT))),
            ("outcome", json!(facts.outcome.map(Outcome::label))),
            ("key", json!(facts.key.as_deref())),
            ("model", json!(facts.model)),
            ("prompt_tokens", json!(facts.usage.map(|usage| usage.prompt))),
            ("cached_tokens", json!(facts.usage.map(|usage| usage.cached))),
            ("completion_tokens", json!(facts.usage.map(|usage| usage.completion))),
            ("started_ms", json!(facts.times.started.map(milliseconds))),
            ("first_token_ms", json!(facts.times.first.map(milliseconds))),
            ("total_ms", json!(milliseconds(total))),
        ];
        request(level, fields);
    }

    fn span(&self, facts: &Facts, total: Duration) -> Option<Span> {
        let asked = facts.asked?;
        let usage = facts.usage.unwrap_or_default();
        let seconds = |time: Duration| Attribute::Double(time.as_secs_f64());
        let mut attributes = vec![
            ("gen_ai.request.id", Attribute::Text(self.id.clone())),
            ("gen_ai.request.n", Attribute::Int(i64::from(asked.n))),
            ("gen_ai.request.max_tokens", Attribute::Int(asked.max_tokens as i64)),
            ("gen_ai.request.temperature", Attribute::Double(f64::from(asked.temperature))),
            ("gen_ai.request.top_p", Attribute::Double(f64::from(asked.top_p))),
            ("gen_ai.usage.prompt_tokens", Attribute::Int(usage.prompt as i64)),
            ("gen_ai.usage.completion_tokens", Attribute::Int(usage.completion as i64)),
            ("gen_ai.latency.e2e", seconds(total)),
        ];
        attributes.extend(facts.model.clone().map(|model| ("gen_ai.response.model", Attribute::Text(model))));
        if let Some(started) = facts.times.started {
            attributes.push(("gen_ai.latency.time_in_queue", seconds(started)));
            attributes
                .push(("gen_ai.latency.time_in_model_inference", seconds(total.saturating_sub(started))));
            if let Some(first) = facts.times.first {
                attributes.extend([
                    ("gen_ai.latency.time_to_first_token", seconds(first)),
                    ("gen_ai.latency.time_in_model_prefill", seconds(first.saturating_sub(started))),
                    ("gen_ai.latency.time_in_model_decode", seconds(total.saturating_sub(first))),
                ]);
            }
        }
        let failed = matches!(facts.outcome, Some(Outcome::EngineError500 | Outcome::NumericError500));
        Some(Span {
            name: "llm_request",
            parent: self.parent,
            began: self.began,
            took: total,
            attributes,
            error: failed.then(|| facts.outcome.map(Outcome::label)).flatten(),
        })
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let facts = std::mem::take(&mut *self.facts());
        let total = self.arrived.elapsed();
        if let (Some(lease), Some(usage)) = (&facts.lease, facts.usage) {
            lease.spend(usage.prompt + usage.completion, Instant::now());
        }
        self.log(&facts, total);
        if let Some(tracer) = &self.app.config.tracer
            && let Some(span) = self.span(&facts, total)
        {
            tracer.export(span);
        }
    }
}
