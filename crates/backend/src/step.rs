use crate::{Error, KvLayout, Result};

/// The rows of one sequence in a step: a prefill chunk (`rows > 1`) or a decode row (`rows == 1`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceInputs {
    /// Rows of this sequence in the step; they follow each other in [`StepInputs::ids`].
    pub rows: usize,
    /// Tokens of the sequence in the KV cache once this step has written its rows.
    pub kv_len: usize,
    /// KV blocks of the sequence, in order of position; at least `kv_len` tokens long.
    pub block_table: Vec<u32>,
}

impl SequenceInputs {
    /// Absolute position of the first row.
    pub fn first_position(&self) -> usize {
        self.kv_len - self.rows
    }
}

/// The integers of one step: what a device needs beside the weights. Prefill chunks and decode rows mix freely.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepInputs {
    /// Token ids, `[rows]`.
    pub ids: Vec<u32>,
    /// fp32 factor on `q·k` per row, `[rows]`: `head_dim^-0.5` times the squared temperature (`docs/architecture.md`, "Positions").
    pub logit_scales: Vec<f32>,
    /// The sequences in row order.
    pub sequences: Vec<SequenceInputs>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<usize>,
}

impl StepInputs {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Absolute position of every row, `[rows]`.
    pub fn positions(&self) -> Vec<u32> {
        self.sequences.iter().flat_map(|s| s.first_position() as u32..s.kv_len as u32).collect()
    }

    /// The same step reduced to its logit rows, for the last layer: what the other rows would compute there is read by
    /// nobody. `None` when the logit rows of a sequence are not its last ones.
    pub fn logit_tail(&self) -> Option<StepInputs> {
        let mut tail = StepInputs::default();
        let mut wanted = self.logit_rows.as_slice();
        let mut first_row = 0;
        for sequence in &self.sequences {
            let end = first_row + sequence.rows;
            let rows = wanted.partition_point(|&r| r < end);
            let (ours, later) = wanted.split_at(rows);
            if !ours.iter().copied().eq(end - rows..end) {
                return None;
            }
            if rows > 0 {
                tail.ids.extend(self.ids.get(end - rows..end)?);
                tail.logit_scales.extend(self.logit_scales.get(end - rows..end)?);
                tail.sequences.push(SequenceInputs { rows, ..sequence.clone() });
            }
            wanted = later;
            first_row = end;
        }
        tail.logit_rows = (0..tail.ids.len()).collect();
        Some(tail)
    }

    /// The step's first `rows` rows, and the others as a step to run after it. A sequence that lies in both ends in the
    /// first at the cut. One after the other, layer by layer or whole, they do what the step does, as long as no sequence reads
    /// blocks that a later one writes.
    pub fn split(self, rows: usize) -> (StepInputs, StepInputs) {
        let cut = rows.min(self.rows());
        let Self { mut ids, mut logit_scales, sequences, logit_rows } = self;
        let mut second = StepInputs {
            ids: ids.split_off(cut.min(ids.len())),
            logit_scales: logit_scales.split_off(cut.min(logit_scales.len())),
            ..StepInputs::default()
        };
        let mut first = StepInputs { ids, logit_scales, ..StepInputs::default() };
        let mut before = 0;
        for sequence in sequences {
            let (rows, kv_len) = (sequence.rows, sequence.kv_len);
            let ours = cut.saturating_sub(before).min(rows);
            before += rows;
            if ours == rows {
                first.sequences.push(sequence);
            } else if ours == 0 {
                second.sequences.push(sequence);
            } else {
                let (rest, length) = (rows - ours, kv_len.saturating_sub(rows - ours));
                first.sequences.push(SequenceInputs { rows: ours, kv_len: length, ..sequence.clone() });
                second.sequences.push(SequenceInputs { rows: rest, ..sequence });
            }
        }
        (first.logit_rows, second.logit_rows) = logit_rows.into_iter().partition(|&row| row < cut);
        second.logit_rows.iter_mut().for_each(|row| *row -= cut);
        (first, second)
    }

    /// Checks that the plan is consistent in itself and with the KV pool, so that devices need not.
    ///
    /// # Errors
    /// [`Error::Step`] naming what contradicts what.
    pub fn check(&self, layout: &KvLayout) -> Result<()> {
        let fail = |message: String| Err(Error::Step(message));
        let rows: usize = self.sequences.iter().map(|s| s.rows).sum();
        if rows == 0 {
            return fail("a step needs at least one row".into());
        }
        if rows != self.ids.len() || rows != self.logit_scales.len() {
            return fail(format!(
                "sequences hold {rows} rows, but there are {} ids and {} logit scales",
                self.ids.len(),
                self.logit_scales.len()
            ));
        }
        for (index, s) in self.sequences.iter().enumerate() {
            if s.rows == 0 || s.rows > s.kv_len || s.kv_len > u32::MAX as usize {
                return fail(format!("sequence {index}: {} rows end at length {}", s.rows, s.kv_len));
            }
            if s.block_table.len() < layout.blocks_for(s.kv_len) {
                return fail(format!(
                    "sequence {index}: {} blocks of {} tokens cannot hold {} tokens",
                    s.block_table.len(),
                    layout.block_size,
                    s.kv_len
                ));
            }
            if let Some(block) = s.block_table.iter().find(|&&b| b as usize >= layout.blocks) {
                return fail(format!(
                    "sequence {index}: block {block} is not in the pool of {}",
                    layout.blocks
                ));
            }
        }
        if self.logit_rows.iter().any(|&r| r >= rows) || !self.logit_rows.is_sorted() {
            return fail(format!("logit rows {:?} are not ascending rows below {rows}", self.logit_rows));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, HeadGroups};

    const LAYOUT: KvLayout = KvLayout {
        layers: 1,
        query_heads: 2,
        kv_heads: 1,
        groups: HeadGroups::Even,
        head_dim: 4,
        block_size: 16,
        blocks: 3,
        dtype: DType::F32,
    };

    fn step() -> StepInputs {
        StepInputs {
            ids: vec![5, 6, 7],
            logit_scales: vec![1.0; 3],
            sequences: vec![
                SequenceInputs { rows: 2, kv_len: 18, block_table: vec![0, 2] },
                SequenceInputs { rows: 1, kv_len: 1, block_table: vec![1] },
            ],
            logit_rows: vec![1, 2],
        }
    }

    #[test]
    fn positions_follow_the_sequences() {
        assert_eq!(step().positions(), [16, 17, 0]);
        step().check(&LAYOUT).unwrap();
    }

    #[test]
    fn a_step_is_cut_at_any_row() {
        for cut in 0..=3 {
            let whole = step();
            let (first, second) = step().split(cut);
            assert_eq!((first.rows(), second.rows()), (cut, 3 - cut));
            for part in [&first, &second].into_iter().filter(|part| part.rows() > 0) {
                part.check(&LAYOUT).unwrap();
            }
            assert_eq!([first.ids.clone(), second.ids.clone()].concat(), whole.ids);
            assert_eq!([first.positions(), second.positions()].concat(), whole.positions());
            let wanted =
                first.logit_rows.iter().copied().chain(second.logit_rows.iter().map(|row| row + cut));
            assert_eq!(wanted.collect::<Vec<_>>(), whole.logit_rows);
        }
        // Within the first sequence: its first row alone, then the rest on the same blocks.
        let (first, second) = step().split(1);
        assert_eq!(first.sequences, [SequenceInputs { rows: 1, kv_len: 17, block_table: vec![0, 2] }]);
        assert_eq!(second.sequences[0], SequenceInputs { rows: 1, kv_len: 18, block_table: vec![0, 2] });
        assert_eq!(second.sequences[1], step().sequences[1]);
    }

    #[test]
    fn the_tail_is_the_logit_rows_at_their_positions() {
        let tail = step().logit_tail().unwrap();
        assert_eq!(tail.ids, [6, 7]);
        assert_eq!(tail.positions(), [17, 0]);
        assert_eq!(tail.logit_rows, [0, 1]);
        tail.check(&LAYOUT).unwrap();
        let only_decode = StepInputs { logit_rows: vec![2], ..step() };
        assert_eq!(only_decode.logit_tail().unwrap().ids, [7]);
        let whole = StepInputs { logit_rows: vec![0, 1, 2], ..step() };
        assert_eq!(whole.logit_tail().unwrap(), whole);
        // Row 0 of a sequence of two is not its last row.
        assert_eq!(StepInputs { logit_rows: vec![0, 2], ..step() }.logit_tail(), None);
        assert_eq!(StepInputs { logit_rows: vec![], ..step() }.logit_tail().unwrap().rows(), 0);
    }

    #[test]
    fn contradictions_are_named() {
        type Break = fn(&mut StepInputs);
        let cases: [(Break, &str); 7] = [
            (|s| s.ids.push(1), "4 ids"),
            (|s| s.logit_scales.clear(), "0 logit scales"),
            (|s| s.sequences[0].kv_len = 1, "2 rows end at length 1"),
            (|s| s.sequences[0].block_table.truncate(1), "cannot hold 18 tokens"),
            (|s| s.sequences[1].block_table[0] = 3, "block 3 is not in the pool of 3"),
            (|s| s.logit_rows = vec![3], "logit rows"),
            (|s| *s = StepInputs::default(), "at least one row"),
        ];
        for (break_it, expected) in cases {
            let mut broken = step();
            break_it(&mut broken);
            let error = broken.check(&LAYOUT).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} lacks {expected}");
        }
    }
}
