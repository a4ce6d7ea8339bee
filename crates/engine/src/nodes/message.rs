//! What the engine's nodes tell each other beside the collective's messages, whose kinds are below 16.
//!
//! ```text
//! step     16 | number u64 | ids | logit scales (bits) | sequences u32, each: rows u32 | kv_len u32 | blocks | logit rows | goal
//! done     17 | number u64            all ranks of the node have done their part
//! ready    18                         all ranks of the node are loaded
//! end      19                         no more steps: the node ends well
//!
//! blocks   20 | number u64 | blocks to zero | blocks to copy from | blocks to copy to
//!
//! goal     1 u32 for the whole logits, else 0 | rows u32, each: temperature, top-p, min-p, repetition, presence and frequency
//!          penalty (bits u32) | top-k u32 | seed u64 | position u64 | seen ids | times generated | biased ids | biases (bits) |
//!          banned ids | 0 u32, or 1 u32 | mask
//! ```
//! Integers are little-endian; lists are a count u32 and words u32.

use longhaul_backend::{OwnedSamplingRow, SamplingRow, SeenToken, SequenceInputs, StepInputs};

use crate::runner::{BlockChanges, Goal, Order, WholeLogits};

/// Kinds below are the collective's.
pub(crate) const FIRST_KIND: u8 = 16;
const STEP: u8 = 16;
const DONE: u8 = 17;
const READY: u8 = 18;
const END: u8 = 19;
const BLOCKS: u8 = 20;

#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    Order { number: u64, order: Order },
    Done { number: u64 },
    Ready,
    End,
}

/// What all ranks do as a message.
pub(crate) fn order(number: u64, order: &Order) -> Vec<u8> {
    match order {
        Order::Step(inputs, goal) => step(number, inputs, goal),
        Order::Blocks(changes) => {
            let mut bytes = vec![BLOCKS];
            bytes.extend(number.to_le_bytes());
            list(&mut bytes, changes.zero.iter().copied());
            list(&mut bytes, changes.copies.iter().map(|(source, _)| *source));
            list(&mut bytes, changes.copies.iter().map(|(_, destination)| *destination));
            bytes
        }
    }
}

fn step(number: u64, inputs: &StepInputs, goal: &Goal) -> Vec<u8> {
    let blocks: usize = inputs.sequences.iter().map(|s| s.block_table.len() + 3).sum();
    let mut bytes = Vec::with_capacity(32 + 4 * (2 * inputs.ids.len() + blocks + inputs.logit_rows.len()));
    bytes.push(STEP);
    bytes.extend(number.to_le_bytes());
    list(&mut bytes, inputs.ids.iter().copied());
    list(&mut bytes, inputs.logit_scales.iter().map(|scale| scale.to_bits()));
    word(&mut bytes, inputs.sequences.len());
    for sequence in &inputs.sequences {
        word(&mut bytes, sequence.rows);
        word(&mut bytes, sequence.kv_len);
        list(&mut bytes, sequence.block_table.iter().copied());
    }
    list(&mut bytes, inputs.logit_rows.iter().map(|&row| row as u32));
    word(&mut bytes, usize::from(goal.logits == WholeLogits::ToHost));
    word(&mut bytes, goal.rows.len());
    goal.rows.iter().for_each(|row| sampling_row(&mut bytes, &row.as_row()));
    bytes
}

fn sampling_row(bytes: &mut Vec<u8>, row: &SamplingRow<'_>) {
    let numbers = [
        row.temperature,
        row.top_p,
        row.min_p,
        row.repetition_penalty,
        row.presence_penalty,
        row.frequency_penalty,
    ];
    bytes.extend(numbers.into_iter().flat_map(|number| number.to_bits().to_le_bytes()));
    bytes.extend(row.top_k.to_le_bytes());
    bytes.extend(row.seed.to_le_bytes());
    bytes.extend(row.position.to_le_bytes());
    list(bytes, row.seen.iter().map(|seen| seen.id));
    list(bytes, row.seen.iter().map(|seen| seen.generated));
    list(bytes, row.bias.iter().map(|(id, _)| *id));
    list(bytes, row.bias.iter().map(|(_, bias)| bias.to_bits()));
    list(bytes, row.banned.iter().copied());
    word(bytes, usize::from(row.allowed.is_some()));
    if let Some(mask) = row.allowed {
        list(bytes, mask.iter().copied());
    }
}

pub(crate) fn done(number: u64) -> Vec<u8> {
    let mut bytes = vec![DONE];
    bytes.extend(number.to_le_bytes());
    bytes
}

pub(crate) fn ready() -> Vec<u8> {
    vec![READY]
}

pub(crate) fn end() -> Vec<u8> {
    vec![END]
}

/// The plan has been checked, so all its numbers fit; one that did not would be refused where it arrives.
fn word(bytes: &mut Vec<u8>, value: usize) {
    bytes.extend(u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
}

fn list(bytes: &mut Vec<u8>, values: impl ExactSizeIterator<Item = u32>) {
    word(bytes, values.len());
    bytes.extend(values.flat_map(u32::to_le_bytes));
}

impl Message {
    /// Reads a message.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut reader = Reader(bytes);
        let [kind] = reader.take()?;
        let message = match kind {
            STEP => {
                let (number, inputs) = (reader.number()?, reader.inputs()?);
                Message::Order { number, order: Order::Step(inputs, reader.goal()?) }
            }
            BLOCKS => {
                let (number, zero) = (reader.number()?, reader.list(|block| block)?);
                let (sources, destinations) = (reader.list(|block| block)?, reader.list(|block| block)?);
                if sources.len() != destinations.len() {
                    return Err("copies without a source or destination".into());
                }
                let copies = sources.into_iter().zip(destinations).collect();
                Message::Order { number, order: Order::Blocks(BlockChanges { zero, copies }) }
            }
            DONE => Message::Done { number: reader.number()? },
            READY => Message::Ready,
            END => Message::End,
            other => return Err(format!("a message of kind {other}")),
        };
        match reader.0.len() {
            0 => Ok(message),
            rest => Err(format!("{rest} bytes behind a message of kind {kind}")),
        }
    }
}

/// Bytes of a sampling row whose lists are empty.
const LEAST_ROW_BYTES: usize = 7 * 4 + 2 * 8 + 6 * 4;

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (first, rest) = self.0.split_first_chunk().ok_or("a message that is too short")?;
        self.0 = rest;
        Ok(*first)
    }

    fn number(&mut self) -> Result<u64, String> {
        self.take().map(u64::from_le_bytes)
    }

    fn word(&mut self) -> Result<u32, String> {
        self.take().map(u32::from_le_bytes)
    }

    /// A count of things of `bytes` bytes at least, all of which are there: nothing is reserved for what is not.
    fn count(&mut self, bytes: usize) -> Result<usize, String> {
        let count = self.word()? as usize;
        match count.checked_mul(bytes) {
            Some(needed) if needed <= self.0.len() => Ok(count),
            _ => Err(format!("a list of {count} in {} bytes", self.0.len())),
        }
    }

    fn list<T>(&mut self, convert: impl Fn(u32) -> T) -> Result<Vec<T>, String> {
        let count = self.count(4)?;
        (0..count).map(|_| self.word().map(&convert)).collect()
    }

    fn inputs(&mut self) -> Result<StepInputs, String> {
        let ids = self.list(|id| id)?;
        let logit_scales = self.list(f32::from_bits)?;
        let sequences = (0..self.count(12)?)
            .map(|_| {
                Ok(SequenceInputs {
                    rows: self.word()? as usize,
                    kv_len: self.word()? as usize,
                    block_table: self.list(|block| block)?,
                })
            })
            .collect::<Result<_, String>>()?;
        let logit_rows = self.list(|row| row as usize)?;
        Ok(StepInputs { ids, logit_scales, sequences, logit_rows })
    }

    fn goal(&mut self) -> Result<Goal, String> {
        let logits = match self.word()? {
            0 => WholeLogits::Stay,
            1 => WholeLogits::ToHost,
            other => return Err(format!("a goal of kind {other}")),
        };
        let rows = (0..self.count(LEAST_ROW_BYTES)?).map(|_| self.sampling_row());
        Ok(Goal { rows: rows.collect::<Result<_, String>>()?, logits })
    }

    fn sampling_row(&mut self) -> Result<OwnedSamplingRow, String> {
        let mut number = || self.word().map(f32::from_bits);
        let [temperature, top_p, min_p] = [number()?, number()?, number()?];
        let [repetition_penalty, presence_penalty, frequency_penalty] = [number()?, number()?, number()?];
        let (top_k, seed, position) = (self.word()?, self.number()?, self.number()?);
        let (ids, generated) = (self.list(|id| id)?, self.list(|times| times)?);
        let (biased, biases) = (self.list(|id| id)?, self.list(f32::from_bits)?);
        if ids.len() != generated.len() || biased.len() != biases.len() {
            return Err("lists of different lengths that belong together".into());
        }
        let seen: Vec<SeenToken> =
            ids.into_iter().zip(generated).map(|(id, generated)| SeenToken { id, generated }).collect();
        let bias: Vec<(u32, f32)> = biased.into_iter().zip(biases).collect();
        let banned = self.list(|id| id)?;
        let allowed = match self.word()? {
            0 => None,
            1 => Some(self.list(|word| word)?),
            other => return Err(format!("a mask of kind {other}")),
        };
        Ok(OwnedSamplingRow::from(&SamplingRow {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            seed,
            position,
            seen: &seen,
            bias: &bias,
            banned: &banned,
            allowed: allowed.as_deref(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> StepInputs {
        StepInputs {
            ids: vec![7, 151_643, 0],
            logit_scales: vec![0.125, f32::MIN_POSITIVE, 0.1],
            sequences: vec![
                SequenceInputs { rows: 2, kv_len: 70_000, block_table: vec![3, 9, 1] },
                SequenceInputs { rows: 1, kv_len: 1, block_table: vec![] },
            ],
            logit_rows: vec![1, 2],
        }
    }

    fn goal() -> Goal {
        let plain = SamplingRow::default();
        let full = SamplingRow {
            temperature: 0.7,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.05,
            repetition_penalty: 1.1,
            presence_penalty: -0.5,
            frequency_penalty: 0.25,
            seed: u64::MAX - 3,
            position: 1 << 40,
            seen: &[SeenToken { id: 5, generated: 0 }, SeenToken { id: 9, generated: 3 }],
            bias: &[(4, -100.0)],
            banned: &[1, 2, 3],
            allowed: Some(&[u32::MAX, 0, 7]),
        };
        Goal::new(&[plain, full], WholeLogits::Stay)
    }

    #[test]
    fn what_is_said_is_heard() {
        let nothing = |logits| Goal::new(&[], logits);
        let both = Goal { logits: WholeLogits::ToHost, ..goal() };
        let steps = [goal(), both, nothing(WholeLogits::ToHost), nothing(WholeLogits::Stay)];
        let changes = BlockChanges { zero: vec![4, 2], copies: vec![(1, 2), (u32::MAX, 0)] };
        let orders = steps
            .map(|goal| Order::Step(inputs(), goal))
            .into_iter()
            .chain([Order::Blocks(changes), Order::Blocks(BlockChanges::default())]);
        for order in orders {
            let said = super::order(u64::MAX - 1, &order);
            assert_eq!(Message::decode(&said), Ok(Message::Order { number: u64::MAX - 1, order }));
        }
        assert_eq!(Message::decode(&done(3)), Ok(Message::Done { number: 3 }));
        assert_eq!(Message::decode(&ready()), Ok(Message::Ready));
        assert_eq!(Message::decode(&end()), Ok(Message::End));
    }

    #[test]
    fn what_is_cut_or_changed_is_refused_or_another_step() {
        let whole = step(1, &inputs(), &goal());
        for length in 0..whole.len() {
            assert!(Message::decode(&whole[..length]).is_err(), "{length} bytes");
        }
        let longer = [&whole[..], &[0]].concat();
        assert!(Message::decode(&longer).unwrap_err().contains("1 bytes behind"));
        // Counts of thousands of millions reserve nothing.
        for at in (9..whole.len()).step_by(4) {
            let mut changed = whole.clone();
            if let Some(word) = changed.get_mut(at..at + 4) {
                word.fill(0xff);
            }
            let _ = Message::decode(&changed);
        }
        assert!(Message::decode(&[99]).unwrap_err().contains("kind 99"));
    }
}
