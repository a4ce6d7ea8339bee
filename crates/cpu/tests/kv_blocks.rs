//! Sequences that fork, or leave the KV pool and come back, attend to the same keys and values, to the bit.

use candle_core::{Device, Tensor};
use longhaul_backend::{Backend, DType, Error, HeadGroups, KvLayout, RopeTables, SequenceInputs, StepInputs};
use longhaul_cpu::{Cpu, KvCache, Precision};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 6;
const LAYERS: usize = 2;
/// Blocks of one sequence.
const COUNT: u32 = 4;

/// Values in `[-1, 1)` (splitmix64).
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

struct Pool {
    cpu: Cpu,
    kv: KvCache,
    layout: KvLayout,
    rope: RopeTables,
}

impl Pool {
    fn new(dtype: DType, block_size: usize) -> Self {
        let cpu = Cpu::new(1, Precision::F32).unwrap();
        let layout = KvLayout {
            layers: LAYERS,
            query_heads: HEADS,
            kv_heads: KV_HEADS,
            groups: HeadGroups::Even,
            head_dim: DIM,
            block_size,
            blocks: 4 * COUNT as usize,
            dtype,
        };
        let rows = COUNT as usize * block_size;
        let angle = |i: usize| (i / (DIM / 2)) as f32 * 0.3f32.powi((i % (DIM / 2)) as i32);
        let rope = RopeTables {
            half_dim: DIM / 2,
            rows,
            cos: (0..rows * DIM / 2).map(|i| angle(i).cos()).collect(),
            sin: (0..rows * DIM / 2).map(|i| angle(i).sin()).collect(),
            chunking: None,
        };
        let kv = cpu.kv_cache(layout).unwrap();
        Self { cpu, kv, layout, rope }
    }

    /// Attention of `rows` random rows behind `before` cached ones, over all layers, as bits. `token` decides the rows.
    fn step(&mut self, blocks: &[u32], token: u64, rows: usize, before: usize) -> Vec<u32> {
        let inputs = StepInputs {
            ids: vec![0; rows],
            logit_scales: vec![0.4; rows],
            sequences: vec![SequenceInputs { rows, kv_len: before + rows, block_table: blocks.to_vec() }],
            logit_rows: vec![],
        };
        let step = self.cpu.begin_step(inputs, &self.kv).unwrap();
        let mut out = Vec::new();
        for layer in 0..LAYERS {
            let cols = (HEADS + 2 * KV_HEADS) * DIM;
            let qkv = values(rows * cols, 1000 * token + layer as u64);
            let qkv = Tensor::from_vec(qkv, (rows, cols), &Device::Cpu).unwrap();
            let q = self.cpu.rope_and_cache(qkv, None, &self.rope, &step, &mut self.kv, layer).unwrap();
            let attended = self.cpu.attention(&q, &self.rope, &step, &self.kv, layer).unwrap();
            out.extend(self.cpu.to_host(&attended).unwrap().into_iter().map(f32::to_bits));
        }
        out
    }
}

#[test]
fn forked_and_swapped_sequences_attend_to_the_same() {
    for dtype in [DType::F32, DType::BF16] {
        for block_size in [1, 3, 8, 17] {
            let mut pool = Pool::new(dtype, block_size);
            // The fork shares a part of a block, except where a block is one token.
            let n = 2 * block_size + block_size / 2;
            let tail = n / block_size;
            let alone: Vec<u32> = (2 * COUNT..3 * COUNT).collect();
            let expected = [(1, n, 0), (2, 1, n), (3, 1, n + 1)]
                .map(|(token, rows, before)| pool.step(&alone, token, rows, before));

            let parent: Vec<u32> = (0..COUNT).rev().collect();
            let mut child = parent.clone();
            for (index, block) in child.iter_mut().enumerate().skip(tail) {
                *block = COUNT + index as u32;
            }
            assert!(pool.step(&parent, 1, n, 0) == expected[0]);
            pool.cpu.copy_blocks(&mut pool.kv, &[(parent[tail], child[tail])]).unwrap();
            pool.step(&parent, 9, 1, n);
            assert!(pool.step(&child, 2, 1, n) == expected[1], "{dtype} blocks of {block_size}");

            let used = &child[..pool.layout.blocks_for(n + 1)];
            let swapped = pool.cpu.read_blocks(&pool.kv, used).unwrap();
            let wrong: Vec<u8> = swapped.iter().map(|byte| byte ^ 0x21).collect();
            pool.cpu.write_blocks(&mut pool.kv, used, &wrong).unwrap();
            let elsewhere: Vec<u32> = (3 * COUNT..4 * COUNT).rev().collect();
            pool.cpu.write_blocks(&mut pool.kv, &elsewhere[..used.len()], &swapped).unwrap();
            assert!(pool.step(&elsewhere, 3, 1, n + 1) == expected[2], "{dtype} blocks of {block_size}");
        }
    }
}

#[test]
fn blocks_that_are_not_there_are_errors() {
    let mut pool = Pool::new(DType::BF16, 4);
    let bytes = pool.cpu.read_blocks(&pool.kv, &[0, 5]).unwrap();
    let outside = pool.layout.blocks as u32;
    let errors = [
        pool.cpu.copy_blocks(&mut pool.kv, &[(0, outside)]),
        pool.cpu.copy_blocks(&mut pool.kv, &[(0, 2), (1, 2)]),
        pool.cpu.copy_blocks(&mut pool.kv, &[(0, 1), (1, 2)]),
        pool.cpu.read_blocks(&pool.kv, &[outside]).map(drop),
        pool.cpu.write_blocks(&mut pool.kv, &[0, outside], &bytes),
        pool.cpu.write_blocks(&mut pool.kv, &[3, 3], &bytes),
        pool.cpu.write_blocks(&mut pool.kv, &[3], &bytes),
    ];
    for error in errors {
        assert!(matches!(error, Err(Error::Blocks(_))), "{error:?}");
    }
    assert!(matches!(
        pool.cpu.kv_cache(KvLayout { dtype: DType::F8E4M3, ..pool.layout }),
        Err(Error::UnsupportedDType { op: "kv_cache", .. })
    ));
}
