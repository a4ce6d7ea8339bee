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
//! 4. **Drafts**, with the rows that are left after all that, behind the decode rows of those that want them.
//!
//! **Rank** is the order (class, start, choice). A request's **class** is its priority, one more for each `aging_interval` since its
//! arrival, up to the highest. A **key's service** is a virtual token counter (Sheng et al., "Fairness in Serving Large Language
//! Models", OSDI 2024): `input_weight` for each prompt token computed, at the start of the request, and `output_weight` for each token
//! drawn; what the cache saves, what preemption repeats and what a wrong draft spends is free. A key that was idle begins at the least counter among those that
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
//!   sequences end within `Σ (⌈2·len / m⌉·(1 + preemptions) + max_tokens)` steps, twice that with two steps in flight, and
//!   `⌈2·block_size / m⌉` more for each draft whose logits are not finite.
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
//! - **A draft delays nobody by more than the time of its own rows.** It takes no row that a decode row or a prefill could have, no
//!   block while anybody waits for one, and none of the last that the next step's decode rows may need; nobody is preempted for it.
//!   So every other sequence has its row in the step that it would have it in, and that step has at most
//!   [`NgramConfig::num_speculative_tokens`] more rows for each sequence that drafts, `max_step_rows` in all. With two steps in flight a
//!   request may start one step later, since drafts give their blocks back only then. (A draft may take an idle block out of the
//!   cache: one that its sequence would soon have taken.)
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
//! # Drafts
//!
//! With [`Config::speculation`], the decode row of a request that wants it ([`Request::speculate`]) is followed by rows of guessed
//! tokens, and a token is drawn from each of these rows. A draw counts as long as the rows before it were guessed right: that is, up to
//! and with the first draw that is not the next row's token. The other draws are dropped, and `planned` is set back: what their rows
//! have written is written again, is proven by nothing and never found in the cache. So what is told is what would be told without drafts,
//! if a draw depends on the row's logits and the token's position alone, and the logits not on the rows beside them. The guess is a
//! lookup of the last tokens in all before them, through an index that grows with the sequence, without a
//! search; a step reads at most `max_step_rows` tokens of prompts into it.
//!
//! Logits that are not finite behind a wrong guess end nothing, since nobody asked for them. But what that row has written may not be
//! finite either, in a block that the sequence still writes to and reads. So such a block is given up, to be zeroed, and what was right
//! in it, less than a block, is computed again as a prefill is.
//!
//! # What it does not do
//!
//! A higher priority is served first, but takes no blocks from those that run until there are none. A step that fails
//! ends all requests in it; nobody looks for the one that made it fail. Drafts come of the sequence itself, not of a second model, and
//! their length does not follow how often they were right.
#![forbid(unsafe_code)]

mod blocks;
mod config;
mod drafts;
mod ngram;
mod plan;
mod planner;
mod prefix;
mod queue;
mod request;
mod results;
mod scheduler;
mod sequence;

pub use blocks::BlockManager;
pub use config::{CacheIdentity, Config, ConfigError, QueueLimits};
pub use ngram::NgramConfig;
pub use plan::{
    BlockCopy, PendingId, PlannedSample, PlannedSequence, ResultsError, SampleResult, StepId, StepPlan,
    StepResults,
};
pub use prefix::{BlockHash, CacheScope, block_hash, root_hash};
pub use request::{
    Event, FinishReason, KeyId, Outcome, QueueBound, Refusal, Request, RequestId, SequenceId, Update, Usage,
};
pub use scheduler::{Scheduler, Snapshot, Step};
