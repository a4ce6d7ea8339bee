use std::time::Duration;

use crate::ngram::NgramConfig;

/// Bounds of a queue of requests that were not started yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Requests.
    pub requests: usize,
    /// Prompt tokens.
    pub tokens: usize,
    /// Bytes of host memory, as the requests state them.
    pub bytes: usize,
}

impl QueueLimits {
    /// No bound.
    pub const NONE: Self = Self { requests: usize::MAX, tokens: usize::MAX, bytes: usize::MAX };
}

/// What cached KV depends on beside the tokens: the root of every chain of block hashes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheIdentity {
    /// Random for each start of the process, so that nobody can search for hashes in advance.
    pub secret: [u8; 32],
    /// The weights and their precision.
    pub model: String,
    /// The position profile: rotation, chunks, length scale, element type of the cache.
    pub positions: String,
}

/// Sizes and limits of a [`crate::Scheduler`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// KV blocks in the pool.
    pub blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Most tokens of a sequence, prompt and output.
    pub max_model_len: usize,
    /// Most sequences that hold blocks at a time; at most the logit rows that a device takes in a step.
    pub max_running: usize,
    /// Most rows of a step; more than `max_running`, so that decode rows leave room for a prefill.
    pub max_step_rows: usize,
    /// Most prefill rows of a step that has decode rows, too: bounds the time between two tokens of a stream.
    pub max_mixed_prefill_rows: usize,
    /// Most rows of a step whose logits are wanted, drawn from or scored; at least `max_running`, better `max_scored_rows` more.
    pub max_logit_rows: usize,
    /// Most prefill rows of scored requests in a step, of all of them together: the logits of each are wanted.
    pub max_scored_rows: usize,
    /// How tokens are drafted for the requests that want it ([`crate::Request::speculate`]); none are without.
    pub speculation: Option<NgramConfig>,
    /// Steps that may be planned before the results of the first are known: 1, or 2 to plan a step while another runs.
    pub max_in_flight: usize,
    /// Blocks that stay available when a request is admitted beside others. At least one per running sequence does in any
    /// case.
    pub watermark_blocks: usize,
    /// Priorities are `0..priority_levels`, the highest first.
    pub priority_levels: u8,
    /// A request gains one priority level each time it has been there for this long.
    pub aging_interval: Duration,
    /// What a prompt token that is computed costs its key.
    pub input_weight: u64,
    /// What an output token costs its key.
    pub output_weight: u64,
    /// Bounds of all waiting requests together.
    pub queue: QueueLimits,
    /// Bounds of the waiting requests of each key.
    pub key_queue: QueueLimits,
    /// Most started requests of one key.
    pub key_max_started: usize,
    /// Most choices of a request.
    pub max_choices: usize,
    /// How long a request may wait for its start.
    pub queue_timeout: Option<Duration>,
    /// How long a request may take in all; its own deadline can only be sooner.
    pub max_request_time: Option<Duration>,
    /// Whether finished KV blocks are kept for prompts that begin alike.
    pub prefix_cache: bool,
    /// What cached blocks depend on beside the tokens.
    pub cache_identity: CacheIdentity,
}

impl Config {
    /// Usual values for a pool of `blocks` blocks of `block_size` tokens: a budget of 2,048 rows a step, 512 of them for prefill
    /// while others decode, 32 scored rows, 256 sequences, 1 % of the pool as watermark, 1,024 waiting requests.
    pub fn new(blocks: usize, block_size: usize, max_model_len: usize) -> Self {
        Self {
            blocks,
            block_size,
            max_model_len,
            max_running: 256,
            max_step_rows: 2048,
            max_mixed_prefill_rows: 512,
            max_logit_rows: usize::MAX,
            max_scored_rows: 32,
            speculation: None,
            max_in_flight: 1,
            watermark_blocks: blocks / 100,
            priority_levels: 8,
            aging_interval: Duration::from_secs(10),
            input_weight: 1,
            output_weight: 2,
            queue: QueueLimits { requests: 1024, ..QueueLimits::NONE },
            key_queue: QueueLimits::NONE,
            key_max_started: usize::MAX,
            max_choices: 16,
            queue_timeout: None,
            max_request_time: None,
            prefix_cache: true,
            cache_identity: CacheIdentity::default(),
        }
    }

    /// Blocks that `tokens` tokens occupy.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size.max(1))
    }

    /// Prefill rows that every step has room for, however many sequences decode.
    pub fn min_prefill_rows(&self) -> usize {
        self.max_step_rows.saturating_sub(self.max_running).min(self.max_mixed_prefill_rows)
    }

    /// Rows of scored requests that every step has room for, however many sequences draw tokens in it.
    pub fn min_scored_rows(&self) -> usize {
        self.scored_rows_beside(self.max_running.saturating_sub(1)).min(self.min_prefill_rows())
    }

    /// Most rows of scored requests beside `draws` logit rows of other sequences.
    pub(crate) fn scored_rows_beside(&self, draws: usize) -> usize {
        self.max_logit_rows.saturating_sub(draws).min(self.max_scored_rows)
    }

    /// Checks that the sizes make a scheduler that can run anything.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn check(&self) -> Result<(), ConfigError> {
        let positive = [
            ("blocks", self.blocks),
            ("block_size", self.block_size),
            ("max_model_len", self.max_model_len),
            ("max_running", self.max_running),
            ("max_mixed_prefill_rows", self.max_mixed_prefill_rows),
            ("max_scored_rows", self.max_scored_rows),
            ("priority_levels", usize::from(self.priority_levels)),
            ("queue.requests", self.queue.requests),
            ("key_queue.requests", self.key_queue.requests),
            ("key_max_started", self.key_max_started),
            ("max_choices", self.max_choices),
        ];
        let fail = |field, message: String| Err(ConfigError { field, message });
        if let Some((field, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return fail(*field, "must be at least 1".into());
        }
        if u32::try_from(self.blocks).is_err() {
            return fail("blocks", format!("is {}; block numbers have 32 bits", self.blocks));
        }
        if u32::try_from(self.max_choices).is_err() {
            return fail("max_choices", format!("is {}; choice numbers have 32 bits", self.max_choices));
        }
        if self.max_step_rows <= self.max_running {
            return fail(
                "max_step_rows",
                format!(
                    "is {}; must exceed max_running ({}), or decoding leaves no row for a prompt",
                    self.max_step_rows, self.max_running
                ),
            );
        }
        if self.max_logit_rows < self.max_running {
            return fail(
                "max_logit_rows",
                format!(
                    "is {}; must be at least max_running ({}), since each sequence may draw a token",
                    self.max_logit_rows, self.max_running
                ),
            );
        }
        if let Some(speculation) = &self.speculation {
            speculation.check()?;
        }
        if !(1..=2).contains(&self.max_in_flight) {
            return fail("max_in_flight", format!("is {}; must be 1 or 2", self.max_in_flight));
        }
        if self.aging_interval.is_zero() {
            return fail("aging_interval", "must be longer than nothing".into());
        }
        Ok(())
    }
}

/// A [`Config`] that makes no scheduler.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("scheduler: {field} {message}")]
pub struct ConfigError {
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_values_are_in_order() {
        let config = Config::new(1000, 16, 4096);
        config.check().unwrap();
        assert_eq!((config.min_prefill_rows(), config.min_scored_rows()), (512, 32));
        assert_eq!(Config { max_logit_rows: 256, ..config.clone() }.min_scored_rows(), 1);
        assert_eq!(Config { max_step_rows: 260, ..config.clone() }.min_scored_rows(), 4);
        assert_eq!(config.blocks_for(17), 2);
    }

    fn ngram(tokens: usize, min: usize, max: usize) -> Option<NgramConfig> {
        let (num_speculative_tokens, prompt_lookup_min, prompt_lookup_max) = (tokens, min, max);
        Some(NgramConfig { num_speculative_tokens, prompt_lookup_max, prompt_lookup_min })
    }

    #[test]
    fn a_wrong_field_is_named() {
        type Break = fn(&mut Config);
        let cases: [(Break, &str); 13] = [
            (|c| c.blocks = 0, "blocks must be at least 1"),
            (|c| c.block_size = 0, "block_size must be"),
            (|c| c.max_step_rows = 256, "max_step_rows is 256"),
            (|c| c.max_logit_rows = 255, "max_logit_rows is 255; must be at least max_running (256)"),
            (|c| c.max_scored_rows = 0, "max_scored_rows must be"),
            (
                |c| c.speculation = ngram(17, 2, 3),
                "speculation.num_speculative_tokens is 17; must be 1 to 16",
            ),
            (|c| c.speculation = ngram(4, 0, 3), "speculation.prompt_lookup_min must be at least 1"),
            (
                |c| c.speculation = ngram(4, 3, 2),
                "prompt_lookup_max is 2; must be at least prompt_lookup_min (3)",
            ),
            (|c| c.max_in_flight = 3, "max_in_flight is 3"),
            (|c| c.priority_levels = 0, "priority_levels must"),
            (|c| c.aging_interval = Duration::ZERO, "aging_interval must"),
            (|c| c.queue.requests = 0, "queue.requests must"),
            (|c| c.blocks = 1 << 33, "blocks is 8589934592"),
        ];
        for (break_it, expected) in cases {
            let mut config = Config::new(1000, 16, 4096);
            break_it(&mut config);
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(expected), "{error} lacks {expected}");
        }
    }
}
