//! Whole models over the device: what a batch and a recorded graph must not change.

mod common;

use std::path::Path;

use common::{driver, open_choice, schedules};
use longhaul_backend::{Backend, DType, SamplingRow, SequenceInputs, StepInputs};
use longhaul_cuda::driver::{Element, EmulatedOptions};
use longhaul_cuda::kv::KvCache;
use longhaul_cuda::{Cuda, Limits};
use longhaul_model::{Model, ModelSpec, PositionProfile, RankShard};
use longhaul_testkit::{Golden, golden_cases, goldens_dir};
use longhaul_weights::Checkpoint;

/// A golden checkpoint on the emulated device with a pool for `sequences` sequences of `tokens` tokens.
struct Device {
    model: Model<Cuda>,
    kv: KvCache,
    positions: PositionProfile,
    block_size: usize,
    blocks_per_sequence: usize,
}

impl Device {
    fn new(case: &Path, options: EmulatedOptions, element: Element, sequences: usize, tokens: usize) -> Self {
        let config = std::fs::read(case.join("config.json")).unwrap();
        let spec = ModelSpec::from_config(&config, "config.json").unwrap();
        let positions = PositionProfile::new(&spec, None, None).unwrap();
        let block_size = positions.block_size();
        let blocks_per_sequence = tokens.div_ceil(block_size);
        let shard = RankShard::whole(&spec);
        let blocks = sequences * blocks_per_sequence;
        let limits = Limits { rows: tokens.max(64), sequences: 64, blocks: 16 * blocks, logit_rows: 64 };
        let cuda = Cuda::new(driver(options), open_choice(), element, &shard.widths(&spec), limits).unwrap();
        let source = Checkpoint::open(case, &spec.tensors(), &spec.ignorable_tensors()).unwrap();
        let model = Model::load(cuda, &spec, &positions, &source, &mut |_, _| {}).unwrap();
        let dtype = if element == Element::F32 { DType::F32 } else { DType::BF16 };
        let layout = shard.kv_layout(&spec, block_size, blocks, dtype);
        let kv = model.kv_cache(layout).unwrap();
        Self { model, kv, positions, block_size, blocks_per_sequence }
    }

    /// The rows `ids` of sequence `index` behind `before` cached tokens; blocks are dealt across the pool.
    fn sequence(&self, index: usize, ids: &[u32], before: usize) -> (SequenceInputs, Vec<f32>) {
        let kv_len = before + ids.len();
        let stride = self.kv.layout().blocks / self.blocks_per_sequence;
        let block_table =
            (0..kv_len.div_ceil(self.block_size)).map(|b| (b * stride + index) as u32).collect();
        let scales = (before..kv_len).map(|p| self.positions.logit_scale(p)).collect();
        (SequenceInputs { rows: ids.len(), kv_len, block_table }, scales)
    }

    /// A step of (sequence, ids, cached tokens) with logits of each one's last row.
    fn step(&self, parts: &[(usize, &[u32], usize)]) -> StepInputs {
        let mut step = StepInputs::default();
        for &(index, ids, before) in parts {
            let (sequence, scales) = self.sequence(index, ids, before);
            step.ids.extend(ids);
            step.logit_scales.extend(scales);
            step.sequences.push(sequence);
            step.logit_rows.push(step.ids.len() - 1);
        }
        step
    }

    fn logits(&mut self, parts: &[(usize, &[u32], usize)]) -> Vec<f32> {
        let step = self.step(parts);
        let logits = self.model.forward(step, &mut self.kv).unwrap().unwrap();
        self.model.backend().to_host(&logits).unwrap()
    }
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len() as u32).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize])).unwrap()
}

/// Eight sequences of different lengths decode together what each decodes alone.
#[test]
fn a_sequence_gives_the_same_tokens_alone_and_in_a_batch() {
    for name in ["dense-dca", "moe-shared", "dense-28-heads"] {
        let case = goldens_dir().join(name);
        let golden = Golden::load(&case);
        // Lengths that differ by no multiple of a block, down to a ninth of the golden's.
        let spacing = (golden.input_ids.len() / 9).max(1);
        let prompts: Vec<&[u32]> =
            (0..8).map(|i| &golden.input_ids[..golden.input_ids.len() - spacing * i]).collect();
        let tokens = golden.input_ids.len() + 8;
        let options = EmulatedOptions { eager: false, seed: 7, ..EmulatedOptions::default() };
        let mut alone = Vec::new();
        for prompt in &prompts {
            let mut device = Device::new(&case, options, Element::Bf16, 1, tokens);
            let mut ids = Vec::new();
            let mut logits = device.logits(&[(0, prompt, 0)]);
            for step in 0..4 {
                ids.push(argmax(&logits));
                logits = device.logits(&[(0, &ids[step..], prompt.len() + step)]);
            }
            alone.push(ids);
        }
        let mut device = Device::new(&case, options, Element::Bf16, 8, tokens);
        let vocab = golden.vocab;
        let mut batched: Vec<Vec<u32>> = vec![Vec::new(); 8];
        for (index, prompt) in prompts.iter().enumerate() {
            batched[index].push(argmax(&device.logits(&[(index, prompt, 0)])));
        }
        for step in 0..3 {
            let last: Vec<[u32; 1]> = batched.iter().map(|ids| [ids[step]]).collect();
            let parts: Vec<_> = (0..8).map(|i| (i, &last[i][..], prompts[i].len() + step)).collect();
            let logits = device.logits(&parts);
            for (ids, row) in batched.iter_mut().zip(logits.chunks_exact(vocab)) {
                ids.push(argmax(row));
            }
        }
        assert_eq!(batched, alone, "{name}");
    }
}

/// Prefill chunks and decode rows of different sequences in one step.
#[test]
fn prefill_and_decode_mix_in_one_step() {
    let case = goldens_dir().join("dense-dca");
    let golden = Golden::load(&case);
    let ids = &golden.input_ids;
    let mut device = Device::new(&case, EmulatedOptions::default(), Element::F32, 3, ids.len());
    let last = ids.len() - 1;
    device.logits(&[(0, &ids[..last], 0)]);
    device.logits(&[(1, &ids[..40], 0)]);
    let mixed = device.logits(&[(1, &ids[40..], 40), (0, &ids[last..], last), (2, &ids[..5], 0)]);
    let rows: Vec<&[f32]> = mixed.chunks_exact(golden.vocab).collect();
    for (row, after) in [(0, last), (1, last), (2, 4)] {
        longhaul_testkit::assert_close("mixed step", rows[row], golden.logits_after(after), 1e-3);
    }
}

/// A replayed graph gives the bits of the eager step, for batches below the recorded size as well.
#[test]
fn a_replayed_graph_gives_the_eager_bits() {
    for case in golden_cases() {
        let golden = Golden::load(&case);
        let ids = &golden.input_ids;
        let half = ids.len() / 2;
        for (options, element) in
            schedules().into_iter().zip([Element::Bf16, Element::F32].into_iter().cycle())
        {
            let mut device = Device::new(&case, options, element, 4, ids.len());
            let lengths = [half, half - 3, 5, 1];
            for (index, &length) in lengths.iter().enumerate() {
                device.logits(&[(index, &ids[..length], 0)]);
            }
            let parts: Vec<_> = lengths
                .iter()
                .enumerate()
                .map(|(i, &length)| (i, &ids[length..length + 1], length))
                .collect();
            let eager = device.logits(&parts);
            let three = device.logits(&parts[..3]);
            // Recorded for one token of sequence 3 four times over: other lengths, other blocks than what is replayed.
            let recorded = device.step(&[parts[3]; 4]);
            let backend = device.model.backend();
            backend.prepare(recorded.clone(), &device.kv).unwrap();
            let (model, kv) = (&device.model, &mut device.kv);
            let (graph, _) = backend
                .record(|| {
                    model.forward(recorded, kv).map_err(|e| longhaul_backend::Error::Step(e.to_string()))
                })
                .unwrap();
            for (rows, expected) in [(4, &eager), (3, &three)] {
                let step = device.step(&parts[..rows]);
                let backend = device.model.backend();
                backend.prepare(step, &device.kv).unwrap();
                backend.replay(graph).unwrap();
                let replayed = backend.to_host(&backend.last_logits(rows)).unwrap();
                assert!(replayed == *expected, "{} {options:?} {element:?}: {rows} rows differ", golden.name);
            }
        }
    }
}

/// A row whose logits are not finite fails alone.
#[test]
fn the_sampler_reports_the_row_that_is_not_finite() {
    let case = goldens_dir().join("dense-tied");
    let golden = Golden::load(&case);
    let mut device = Device::new(&case, EmulatedOptions::default(), Element::F32, 2, 16);
    let step = device.step(&[(0, &golden.input_ids[..4], 0), (1, &golden.input_ids[..5], 0)]);
    let logits = device.model.forward(step, &mut device.kv).unwrap().unwrap();
    let backend = device.model.backend();
    let row = SamplingRow::default();
    let rows = [row.clone(), row];
    let drawn = backend.sample(&logits, &[golden.vocab], &rows).unwrap();
    assert_eq!(drawn[0].unwrap().id, argmax(golden.logits_after(3)));
    assert_eq!(drawn[1].unwrap().id, argmax(golden.logits_after(4)));
    let nan = f32::NAN.to_le_bytes();
    backend.context().driver.upload(logits.row_address(1).offset(4 * 7), &nan).unwrap();
    let after = backend.sample(&logits, &[golden.vocab], &rows).unwrap();
    assert_eq!(after, [drawn[0], Err(longhaul_backend::RowError::NotFinite)]);
}
