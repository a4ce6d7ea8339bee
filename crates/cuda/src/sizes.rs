//! How much memory a step takes, from the model's widths: everything is taken at start.

use longhaul_backend::Widths;

use crate::driver::{Driver, Element};
use crate::ops::{attention, sampling};
use crate::tensor::padded_cols;

/// What one step may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows (tokens).
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Block table entries of all sequences.
    pub blocks: usize,
    /// Rows whose logits are wanted.
    pub logit_rows: usize,
}

impl Limits {
    /// What of `step` is more than these limits, in words.
    pub fn exceeded_by(&self, step: &Limits) -> Option<String> {
        [
            ("rows", step.rows, self.rows),
            ("sequences", step.sequences, self.sequences),
            ("block table entries", step.blocks, self.blocks),
            ("logit rows", step.logit_rows, self.logit_rows),
        ]
        .into_iter()
        .find(|(_, wanted, limit)| wanted > limit)
        .map(|(what, wanted, limit)| format!("{wanted} {what}; the device's buffers are for {limit}"))
    }
}

/// Partial sums and work lists of split products: at most this, whatever the model.
const SCRATCH_BYTES: usize = 48 << 20;

/// Bytes of the step arena: the tensors of a layer that are alive at once, and the sampler's.
pub(crate) fn arena_bytes(widths: &Widths, limits: &Limits, element: Element, driver: &dyn Driver) -> usize {
    let red_zone = driver.red_zone_bytes() + 256;
    let tensor =
        |rows: usize, cols: usize, e: Element| rows * padded_cols(cols, e) * e.size() + 256 + red_zone;
    let rows = limits.rows;
    let act = |cols: usize| tensor(rows, cols, element);
    let stream = tensor(rows, widths.hidden, Element::F32) + 2 * act(widths.hidden);
    let to_residual = tensor(rows, widths.hidden, Element::F32);
    // Partial results of every split of every sequence; a head's two sums are less than a sixteenth of its values.
    let splits =
        limits.sequences * attention::MOST_SPLITS * (widths.whole_groups + widths.whole_groups / 16) * 4;
    let attention = act(widths.qkv) + 2 * act(widths.query) + to_residual + splits;
    let dense = act(2 * widths.intermediate) + act(widths.intermediate) + 2 * to_residual;
    let slots = rows * widths.top_k;
    let routed = tensor(slots, widths.expert_intermediate, element)
        + tensor(slots, widths.hidden, Element::F32)
        + tensor(rows, 2 * widths.experts, Element::F32)
        + 8 * tensor(slots, 1, Element::U32);
    // Logits that were gathered from all ranks, and a working copy.
    let sampler = 2 * tensor(limits.logit_rows, widths.whole_vocabulary, Element::F32)
        + sampling::scratch_bytes(limits.logit_rows, widths.whole_vocabulary);
    stream + attention.max(dense + routed).max(sampler) + SCRATCH_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_that_is_exceeded_is_named() {
        let limits = Limits { rows: 8, sequences: 2, blocks: 4, logit_rows: 2 };
        assert_eq!(limits.exceeded_by(&limits), None);
        let message = limits.exceeded_by(&Limits { blocks: 5, ..limits }).unwrap();
        assert!(message.contains("5 block table entries") && message.contains("for 4"), "{message}");
    }
}
