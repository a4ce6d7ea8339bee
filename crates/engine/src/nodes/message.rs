//! What the engine's nodes tell each other beside the collective's messages, whose kinds are below 16.
//!
//! ```text
//! step     16 | number u64 | ids | logit scales (bits) | sequences u32, each: rows u32 | kv_len u32 | blocks | logit rows
//! done     17 | number u64            all ranks of the node have done their part
//! ready    18                         all ranks of the node are loaded
//! end      19                         no more steps: the node ends well
//! ```
//! Integers are little-endian; lists are a count u32 and words u32.

use longhaul_backend::{SequenceInputs, StepInputs};

/// Kinds below are the collective's.
pub(crate) const FIRST_KIND: u8 = 16;
const STEP: u8 = 16;
const DONE: u8 = 17;
const READY: u8 = 18;
const END: u8 = 19;

#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    Step { number: u64, inputs: StepInputs },
    Done { number: u64 },
    Ready,
    End,
}

/// A step as a message.
pub(crate) fn step(number: u64, inputs: &StepInputs) -> Vec<u8> {
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
    bytes
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
            STEP => Message::Step { number: reader.number()?, inputs: reader.inputs()? },
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

    #[test]
    fn what_is_said_is_heard() {
        let step = step(u64::MAX - 1, &inputs());
        assert_eq!(Message::decode(&step), Ok(Message::Step { number: u64::MAX - 1, inputs: inputs() }));
        assert_eq!(Message::decode(&done(3)), Ok(Message::Done { number: 3 }));
        assert_eq!(Message::decode(&ready()), Ok(Message::Ready));
        assert_eq!(Message::decode(&end()), Ok(Message::End));
    }

    #[test]
    fn what_is_cut_or_changed_is_refused_or_another_step() {
        let whole = step(1, &inputs());
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
