//! Which tokens of which requests run in the next step, and in which KV blocks.
//!
//! [`Scheduler::step`] takes what has happened ([`Event`]) and the time, and returns the next [`StepPlan`] and the news for the
//! clients ([`Update`]). It has no threads, no clock, no randomness and no order that depends on a hash table: the same calls give
//! the same plans. It knows no device, no model and no text. Attention is paged, and cached keys depend on the tokens before
//! them alone, under Dual Chunk Attention too, so nothing here knows which attention it is.
//!
//! ```
//! use std::time::Duration;
//! use longhaul_scheduler::{
//!     Config, Event, KeyId, Request, RequestId, SampleResult, Scheduler, StepResults, Update,
//! };
//!
//! let mut scheduler = Scheduler::new(Config::new(64, 16, 1024))?;
//! let mut events = vec![Event::Submit(Request::new(RequestId(1), KeyId(0), vec![11, 12, 13], 2))];
//! let mut now = Duration::ZERO;
//! let mut tokens = Vec::new();
//! loop {
//!     let step = scheduler.step(now, events.drain(..))?;
//!     for update in step.updates {
//!         if let Update::Token { token, .. } = update {
//!             tokens.push(token);
//!         }
//!     }
//!     // A server would wait for more events here.
//!     let Some(plan) = step.plan else { break };
//!     // Here the device runs the plan. This one always draws 7.
//!     let samples = vec![SampleResult::Token(7); plan.samples.len()];
//!     events.push(Event::Results(StepResults { step: plan.step, samples }));
//!     now += Duration::from_millis(10);
//! }
//! assert_eq!(tokens, [7, 7]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # A step
//!
//! 1. **Decode.** Each running sequence that is one row short of its next token gets that row, the first in rank first. Where it
//!    needs a block and none is available, the last in rank gives up its own (*preemption*): it keeps its tokens, and computes
//!    their KV again when it is its turn.
//! 2. **Prefill**, with what is left of `max_step_rows`, and no more than `max_mixed_prefill_rows` beside decode rows. Half of it is
//!    for the first in rank. The other half is for the rest, the key that was served least first, then the shorter prompt. What
//!    one half leaves the other takes. Rows of *scored* requests, whose logits are all wanted, are `max_scored_rows` at most; these
//!    are halved in the same way.
//! 3. **Admission**, as long as the second half has rows to give: of the highest class, those that were preempted, then
//!    the key that was served least, then who came first. The one chosen gets blocks for all its tokens at once, cached ones
//!    where the prefix is known. If they are not there, nobody is admitted: a large request is not passed by small ones.
//!    Scored requests are passed over while those that run take all the rows that may be scored.
//!
//! **Rank** is the order (class, start, choice). A request's **class** is its priority, one more for each `aging_interval` since its
//! arrival, up to the highest. A **key's service** is a virtual token counter (Sheng et al., "Fairness in Serving Large Language
//! Models", OSDI 2024): `input_weight` for each prompt token computed, at the start of the request, and `output_weight` for each token
//! drawn; what the cache saves and what preemption repeats is free. A key that was idle begins at the least counter among those that
//! were not, so idle time is not saved up.
//!
//! # What is promised
//!
//! With `m` = [`Config::min_prefill_rows`], `s` = [`Config::min_scored_rows`] and `len` = prompt and output tokens:
//!
//! - **One end.** Each submitted request gets one [`Update::Finished`], and nothing after it.
//! - **Decoding waits for no prompt.** Between two tokens of a sequence that is not preempted lies one step of at most
//!   `max_step_rows` rows, of which `max_mixed_prefill_rows` prefill.
//! - **A prompt waits for no decoding.** A step with anything to prefill has room for `m` rows of it, and the first in rank gets half:
//!   `n` prompt tokens take it at most `⌈2n / m⌉` steps, and `⌈2n / s⌉` if they are scored (read `s` for `m` below, too).
//! - **What is started ends.** In every step the first in rank among the running advances, and it is not preempted. So started
//!   sequences end within `Σ (⌈2·len / m⌉·(1 + preemptions) + max_tokens)` steps, twice that with two steps in flight.
//! - **No thrashing.** After `p` preemptions a sequence comes back beside others only when `max(watermark_blocks, running)·2^p`
//!   blocks are to spare, so at most about `log2(blocks)` times. Then it waits until the pool is its own, and only a higher
//!   class can displace it.
//! - **What waits starts.** After `(priority_levels − 1 − priority)·aging_interval` a request is in the highest class. From then on,
//!   and before it starts, a key `j` other than its own, `k`, is served at most `max(0, c_k − c_j) + Q + G`: `c` are the counters, `Q` what
//!   the requests of `k` before it cost, and `G` one prompt and the output that started requests of one key may still draw. Among keys
//!   that use one priority, `|c_k − c_j| ≤ G`. (A scored request is passed over besides, but only while scored ones run, which end.)
//! - **What never fits is refused at once**: longer than the context, or than the whole pool.
//! - **Nobody's KV is another's.** A block is found by SHA-256 over all tokens before it and in it, a secret of the process, the
//!   model, the position profile, the key (unless sharing is asked for) and the salt. It is written by one sequence that holds
//!   it alone, and never once it can be found.
//! - **NaN is not kept.** A block can be found only once a row of its sequence that has read it had finite logits, which no NaN
//!   among the keys and values would have left it. What is given up without that proof is zeroed before its next use
//!   ([`StepPlan::scrub`]). (An infinite key can hide behind a score of −∞. The first row that it spoils takes it out of the cache,
//!   with all that the row has read.)
//!
//! # Steps in flight
//!
//! With `max_in_flight` = 2 a step is planned while another runs. A row whose token is still being drawn is a [`PendingId`]: the
//! device takes the id from its own samples. Steps run in order on one stream, so a block may be given away while a step in
//! flight writes to it. A sequence that turns out to have ended has computed one row too many, which nobody is told of.
//! [`Request::run_ahead`] = false waits for the host, for requests whose sampling needs the tokens so far.
//!
//! # What it does not do
//!
//! A higher priority is served first, but takes no blocks from those that run until there are none. A step that fails
//! ends all requests in it; nobody looks for the one that made it fail. A sequence draws one token a step: speculative decoding needs
//! plans with several logit rows a sequence, a [`SampleResult`] of several tokens, and `planned` set back to what was accepted; nothing
//! else counts on one.
#![forbid(unsafe_code)]

mod blocks;
mod config;
mod plan;
mod planner;
mod prefix;
mod queue;
mod request;
mod scheduler;
mod sequence;

pub use blocks::BlockManager;
pub use config::{CacheIdentity, Config, ConfigError, QueueLimits};
pub use plan::{
    BlockCopy, PendingId, PlannedSample, PlannedSequence, ResultsError, SampleResult, StepId, StepPlan,
    StepResults,
};
pub use prefix::{BlockHash, CacheScope, block_hash, root_hash};
pub use request::{
    Event, FinishReason, KeyId, Outcome, QueueBound, Refusal, Request, RequestId, SequenceId, Update, Usage,
};
pub use scheduler::{Scheduler, Snapshot, Step};
