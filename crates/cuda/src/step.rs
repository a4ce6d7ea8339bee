//! The integers of a step on the device: one packed buffer, one copy a step (`cuda/common/step.h`).

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longhaul_backend::StepInputs;

use crate::driver::{DevicePtr, Driver, Memory};
use crate::{CudaError, Result};

/// The header in front of the packed arrays; offsets are in 4-byte words from the header.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct StepHeader {
    rows: u32,
    sequences: u32,
    logit_rows: u32,
    max_kv_len: u32,
    ids: u32,
    positions: u32,
    logit_scales: u32,
    row_sequence: u32,
    sequence_info: u32,
    logit_row_ids: u32,
    decode_sequences: u32,
    decode_count: u32,
    prefill_sequences: u32,
    prefill_count: u32,
    reserved: [u32; 2],
}

const HEADER_WORDS: usize = size_of::<StepHeader>() / 4;

/// A step on the device, with the lengths a launch geometry is made from.
#[derive(Clone)]
pub struct Step {
    memory: Arc<Memory>,
    /// The plan it was made from.
    pub inputs: Arc<StepInputs>,
    /// Sequences with one row.
    pub decode_sequences: usize,
    /// Rows of every sequence with more than one row, in order.
    pub prefill_rows: Vec<usize>,
    /// Tokens in the cache of the longest sequence.
    pub max_kv_len: usize,
}

impl Step {
    /// Address of the header.
    pub fn address(&self) -> DevicePtr {
        self.memory.address()
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.inputs.rows()
    }

    /// Rows whose logits are wanted.
    pub fn logit_rows(&self) -> usize {
        self.inputs.logit_rows.len()
    }

    /// Packs `inputs` and copies them to `memory`.
    ///
    /// # Errors
    /// A step that is larger than `memory`, or a failed copy.
    pub fn upload(driver: &Arc<dyn Driver>, memory: Arc<Memory>, inputs: StepInputs) -> Result<Self> {
        let words = pack(&inputs);
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        if bytes.len() > memory.bytes() {
            return Err(CudaError::shape(
                "step",
                format!("{} bytes of step inputs for a buffer of {}", bytes.len(), memory.bytes()),
            ));
        }
        driver.upload(memory.address(), bytes)?;
        let prefill = inputs.sequences.iter().filter(|s| s.rows > 1);
        Ok(Self {
            memory,
            decode_sequences: inputs.sequences.iter().filter(|s| s.rows == 1).count(),
            prefill_rows: prefill.map(|s| s.rows).collect(),
            max_kv_len: inputs.sequences.iter().map(|s| s.kv_len).max().unwrap_or(0),
            inputs: Arc::new(inputs),
        })
    }

    /// Bytes that hold any step of at most `rows` rows, `sequences` sequences and `blocks` block table entries in all.
    pub fn capacity_bytes(rows: usize, sequences: usize, blocks: usize) -> usize {
        // ids, positions, scales, row_sequence, logit rows; four words and two list entries a sequence.
        4 * (HEADER_WORDS + 5 * rows + 6 * sequences + blocks)
    }
}

/// Header and arrays of a step, in words.
fn pack(inputs: &StepInputs) -> Vec<u32> {
    let mut words = vec![0u32; HEADER_WORDS];
    let mut append = |values: &mut dyn Iterator<Item = u32>| {
        let offset = words.len() as u32;
        words.extend(values);
        offset
    };
    let sequences = &inputs.sequences;
    let of_kind = |wanted: fn(usize) -> bool| -> Vec<u32> {
        (0u32..).zip(sequences).filter(|(_, s)| wanted(s.rows)).map(|(index, _)| index).collect()
    };
    let (decode, prefill) = (of_kind(|rows| rows == 1), of_kind(|rows| rows > 1));
    let mut header = StepHeader {
        rows: inputs.rows() as u32,
        sequences: sequences.len() as u32,
        logit_rows: inputs.logit_rows.len() as u32,
        max_kv_len: sequences.iter().map(|s| s.kv_len).max().unwrap_or(0) as u32,
        ids: append(&mut inputs.ids.iter().copied()),
        positions: append(&mut inputs.positions().into_iter()),
        logit_scales: append(&mut inputs.logit_scales.iter().map(|s| s.to_bits())),
        row_sequence: append(
            &mut (0u32..).zip(sequences).flat_map(|(index, s)| std::iter::repeat_n(index, s.rows)),
        ),
        logit_row_ids: append(&mut inputs.logit_rows.iter().map(|&r| r as u32)),
        decode_count: decode.len() as u32,
        decode_sequences: append(&mut decode.into_iter()),
        prefill_count: prefill.len() as u32,
        prefill_sequences: append(&mut prefill.into_iter()),
        ..StepHeader::default()
    };
    let mut first_row = 0;
    let mut infos = Vec::with_capacity(4 * sequences.len());
    for sequence in sequences {
        let table = append(&mut sequence.block_table.iter().copied());
        infos.extend([first_row, sequence.rows as u32, sequence.kv_len as u32, table]);
        first_row += sequence.rows as u32;
    }
    header.sequence_info = append(&mut infos.into_iter());
    words[..HEADER_WORDS].copy_from_slice(bytemuck::cast_slice(&[header]));
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use longhaul_backend::SequenceInputs;

    #[test]
    fn every_array_is_where_the_header_says() {
        let inputs = StepInputs {
            ids: vec![5, 6, 7],
            logit_scales: vec![0.5, 0.25, 1.0],
            sequences: vec![
                SequenceInputs { rows: 2, kv_len: 18, block_table: vec![0, 2] },
                SequenceInputs { rows: 1, kv_len: 1, block_table: vec![1] },
            ],
            logit_rows: vec![1, 2],
        };
        let words = pack(&inputs);
        assert!(words.len() * 4 <= Step::capacity_bytes(3, 2, 3));
        let header: StepHeader = *bytemuck::from_bytes(bytemuck::cast_slice(&words[..HEADER_WORDS]));
        let at = |offset: u32, count: usize| &words[offset as usize..offset as usize + count];
        assert_eq!(at(header.ids, 3), [5, 6, 7]);
        assert_eq!(at(header.positions, 3), [16, 17, 0]);
        assert_eq!(at(header.logit_scales, 3), [0.5f32, 0.25, 1.0].map(f32::to_bits));
        assert_eq!(at(header.row_sequence, 3), [0, 0, 1]);
        assert_eq!(at(header.logit_row_ids, 2), [1, 2]);
        assert_eq!((at(header.decode_sequences, 1), header.decode_count), (&[1][..], 1));
        assert_eq!((at(header.prefill_sequences, 1), header.prefill_count), (&[0][..], 1));
        let info = at(header.sequence_info, 8);
        assert_eq!((info[..3].to_vec(), info[4..7].to_vec()), (vec![0, 2, 18], vec![2, 1, 1]));
        assert_eq!(at(info[3], 2), [0, 2]);
        assert_eq!(at(info[7], 1), [1]);
        assert_eq!(header.max_kv_len, 18);
    }
}
