//! Copies of KV blocks: the kernel against a model of the pool in host memory, and sequences that fork or are swapped out.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Random, context, schedules};
use longhaul_backend::{Backend, DType, Error, HeadGroups, KvLayout, SequenceInputs, StepInputs};
use longhaul_cuda::driver::{Driver, Element, Emulated, EmulatedOptions};
use longhaul_cuda::kv::KvCache;
use longhaul_cuda::ops::kv::{copy_blocks, read_blocks, write_blocks};
use longhaul_cuda::{Cuda, Limits, Variant};
use longhaul_model::{Model, ModelSpec, PositionProfile, RankShard};
use longhaul_testkit::{Golden, goldens_dir};
use longhaul_weights::Checkpoint;

fn layout(layers: usize, kv_heads: usize, head_dim: usize, block_size: usize, blocks: usize) -> KvLayout {
    KvLayout {
        layers,
        query_heads: kv_heads,
        groups: HeadGroups::Even,
        kv_heads,
        head_dim,
        block_size,
        blocks,
        dtype: DType::F32,
    }
}

/// The pool as bytes `[planes][blocks][block_bytes]`.
struct Pool {
    bytes: Vec<u8>,
    blocks: usize,
    block_bytes: usize,
}

impl Pool {
    fn block(&mut self, plane: usize, block: usize) -> &mut [u8] {
        &mut self.bytes[(plane * self.blocks + block) * self.block_bytes..][..self.block_bytes]
    }
}

/// Blocks of one byte up to blocks of several parts, of elements of every size.
#[test]
fn copies_move_whole_blocks_and_nothing_else() {
    let shapes = [
        (layout(1, 1, 2, 1, 3), Element::E4m3),
        (layout(3, 3, 2, 5, 7), Element::E4m3),
        (layout(2, 1, 6, 3, 5), Element::Bf16),
        (layout(2, 2, 64, 16, 9), Element::Bf16),
        (layout(2, 3, 80, 32, 6), Element::F32),
    ];
    for (index, options) in schedules().into_iter().enumerate() {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        let mut random = Random(index as u64);
        for (layout, element) in shapes {
            let mut kv = KvCache::with_element(&ctx.driver, layout, element, None).unwrap();
            let bytes: Vec<u8> = (0..kv.bytes()).map(|_| random.next_u64() as u8).collect();
            ctx.driver.upload(kv.address(), &bytes).unwrap();
            let (planes, block_bytes) = (kv.planes(), kv.block_bytes());
            let mut pool = Pool { bytes, blocks: layout.blocks, block_bytes };
            let last = layout.blocks as u32 - 1;
            let pairs = [(0, last), (0, 1)];
            copy_blocks(&ctx, &mut kv, &pairs).unwrap();
            for plane in 0..planes {
                let source = pool.block(plane, 0).to_vec();
                pool.block(plane, last as usize).copy_from_slice(&source);
                pool.block(plane, 1).copy_from_slice(&source);
            }
            let device = |kv: &KvCache| {
                let mut bytes = vec![0; kv.bytes()];
                ctx.driver.download(kv.address(), &mut bytes).unwrap();
                bytes
            };
            assert!(device(&kv) == pool.bytes, "{layout:?} {element:?}");

            let taken = read_blocks(&ctx, &kv, &[last, 0]).unwrap();
            let expected: Vec<u8> = [last as usize, 0]
                .iter()
                .flat_map(|&block| (0..planes).map(move |plane| (plane, block)))
                .flat_map(|(plane, block)| pool.block(plane, block).to_vec())
                .collect();
            assert!(taken == expected, "{layout:?} {element:?}");
            let other: Vec<u8> = taken.iter().map(|byte| !byte).collect();
            write_blocks(&ctx, &mut kv, &[1, last], &other).unwrap();
            for (index, block) in [1, last as usize].into_iter().enumerate() {
                for plane in 0..planes {
                    let from = (index * planes + plane) * block_bytes;
                    pool.block(plane, block).copy_from_slice(&other[from..from + block_bytes]);
                }
            }
            assert!(device(&kv) == pool.bytes, "{layout:?} {element:?}");
            copy_blocks(&ctx, &mut kv, &[]).unwrap();
            assert!(read_blocks(&ctx, &kv, &[]).unwrap().is_empty());
        }
    }
}

/// More blocks than the buffer to the host holds.
#[test]
fn many_blocks_go_through_the_buffer_in_turns() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let layout = layout(2, 4, 128, 128, 20);
    let mut kv = KvCache::with_element(&ctx.driver, layout, Element::F32, None).unwrap();
    let values: Vec<u32> = (0..kv.bytes() as u32 / 4).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    ctx.driver.upload(kv.address(), &bytes).unwrap();
    let order: Vec<u32> = (0..20).map(|i| (i * 7 + 3) % 20).collect();
    let taken = read_blocks(&ctx, &kv, &order).unwrap();
    assert!(taken.len() > 16 << 20);
    ctx.driver.fill(kv.address(), 0, kv.bytes()).unwrap();
    write_blocks(&ctx, &mut kv, &order, &taken).unwrap();
    let mut back = vec![0; kv.bytes()];
    ctx.driver.download(kv.address(), &mut back).unwrap();
    assert!(back == bytes);
}

fn load<B: Backend>(backend: B, case: &Path) -> (Model<B>, PositionProfile) {
    let config = std::fs::read(case.join("config.json")).unwrap();
    let spec = ModelSpec::from_config(&config, "config.json").unwrap();
    let positions = PositionProfile::new(&spec, None, None).unwrap();
    let checkpoint = Checkpoint::open(case, &spec.tensors(), &spec.ignorable_tensors()).unwrap();
    let model = Model::load(backend, &spec, &positions, &checkpoint, &mut |_, _| {}).unwrap();
    (model, positions)
}

fn cuda(case: &Path, options: EmulatedOptions, element: Element) -> Cuda {
    let config = std::fs::read(case.join("config.json")).unwrap();
    let spec = ModelSpec::from_config(&config, "config.json").unwrap();
    let widths = RankShard::whole(&spec).widths(&spec);
    let limits = Limits { rows: 256, sequences: 4, blocks: 1024, logit_rows: 4 };
    let driver: Arc<dyn Driver> = Arc::new(Emulated::new(options).unwrap());
    Cuda::new(driver, Variant::Auto, element, &widths, limits).unwrap()
}

/// A model, its pool, and steps of one sequence given by its blocks.
struct Device<B: Backend> {
    model: Model<B>,
    kv: B::KvCache,
    positions: PositionProfile,
    layout: KvLayout,
}

impl<B: Backend> Device<B> {
    fn new(backend: B, case: &Path, dtype: DType) -> Self {
        let config = std::fs::read(case.join("config.json")).unwrap();
        let spec = ModelSpec::from_config(&config, "config.json").unwrap();
        let (model, positions) = load(backend, case);
        let layout = KvLayout {
            layers: spec.layers,
            query_heads: spec.query_heads,
            kv_heads: spec.kv_heads,
            groups: HeadGroups::Even,
            head_dim: spec.head_dim,
            block_size: positions.block_size(),
            blocks: 4 * (PROMPT + 3).div_ceil(positions.block_size()),
            dtype,
        };
        let kv = model.kv_cache(layout).unwrap();
        Self { model, kv, positions, layout }
    }

    /// Logits after `ids`, which follow `before` cached tokens, as bits.
    fn step(&mut self, blocks: &[u32], ids: &[u32], before: usize) -> Vec<u32> {
        let kv_len = before + ids.len();
        let inputs = StepInputs {
            ids: ids.to_vec(),
            logit_scales: (before..kv_len).map(|p| self.positions.logit_scale(p)).collect(),
            sequences: vec![SequenceInputs { rows: ids.len(), kv_len, block_table: blocks.to_vec() }],
            logit_rows: vec![ids.len() - 1],
        };
        let logits = self.model.forward(inputs, &mut self.kv).unwrap().unwrap();
        let logits = self.model.backend().to_host(&logits).unwrap();
        logits.into_iter().map(f32::to_bits).collect()
    }

    /// A sequence forks in the middle of a block; then it is swapped out, its blocks are overwritten, and it comes back
    /// elsewhere. Everything to the bit.
    fn forks_and_swaps(&mut self, prompt: &[u32]) {
        let count = self.layout.blocks_for(prompt.len() + 3) as u32;
        assert!(
            !prompt.len().is_multiple_of(self.layout.block_size),
            "the fork must share a part of a block"
        );
        let parent: Vec<u32> = (0..count).rev().collect();
        let tail = prompt.len() / self.layout.block_size;
        let mut child = parent.clone();
        child[tail..].copy_from_slice(&(count..2 * count).collect::<Vec<_>>()[tail..]);
        let alone: Vec<u32> = (2 * count..3 * count).collect();
        let (n, [x, y, z]) = (prompt.len(), [prompt[0], prompt[1], prompt[2]]);
        let expected: Vec<_> = [(prompt, 0), (&[x][..], n), (&[y], n + 1), (&[z], n + 2)]
            .map(|(ids, at)| self.step(&alone, ids, at))
            .into();

        assert!(self.step(&parent, prompt, 0) == expected[0]);
        self.model.backend().copy_blocks(&mut self.kv, &[(parent[tail], child[tail])]).unwrap();
        // The parent goes elsewhere first, in the slots that the child would share without the copy.
        self.step(&parent, &[z], n);
        self.step(&parent, &[x], n + 1);
        assert!(self.step(&child, &[x], n) == expected[1], "a forked sequence decodes differently");
        assert!(self.step(&child, &[y], n + 1) == expected[2], "a forked sequence decodes differently");

        let used = &child[..self.layout.blocks_for(n + 2)];
        let swapped = self.model.backend().read_blocks(&self.kv, used).unwrap();
        let wrong: Vec<u8> = swapped.iter().map(|byte| byte ^ 0x21).collect();
        self.model.backend().write_blocks(&mut self.kv, used, &wrong).unwrap();
        let mut elsewhere: Vec<u32> = (3 * count..4 * count).collect();
        elsewhere.reverse();
        let backend = self.model.backend();
        backend.write_blocks(&mut self.kv, &elsewhere[..used.len()], &swapped).unwrap();
        assert!(self.step(&elsewhere, &[z], n + 2) == expected[3], "a swapped sequence decodes differently");
    }

    fn refuses_what_is_not_there(&mut self) {
        let blocks = self.layout.blocks as u32;
        let backend = self.model.backend();
        let is_error = |result: Result<(), Error>, expected: &str| {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Blocks(_)), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        is_error(backend.copy_blocks(&mut self.kv, &[(0, blocks)]), "not in the pool");
        is_error(backend.copy_blocks(&mut self.kv, &[(0, 2), (1, 2)]), "written twice");
        is_error(backend.copy_blocks(&mut self.kv, &[(0, 1), (1, 2)]), "from and to");
        is_error(backend.read_blocks(&self.kv, &[blocks]).map(drop), "not in the pool");
        let bytes = backend.read_blocks(&self.kv, &[0]).unwrap();
        is_error(backend.write_blocks(&mut self.kv, &[blocks], &bytes), "not in the pool");
        is_error(backend.write_blocks(&mut self.kv, &[0, 0], &bytes.repeat(2)), "written twice");
        is_error(backend.write_blocks(&mut self.kv, &[0], &bytes[1..]), "bytes for 1 blocks");
    }
}

/// Tokens of the sequence that forks: not a multiple of any block size.
const PROMPT: usize = 37;

#[test]
fn forked_and_swapped_sequences_decode_the_same() {
    let elements = [(Element::Bf16, DType::BF16), (Element::F32, DType::F32), (Element::Bf16, DType::F8E4M3)];
    for (options, (element, dtype)) in schedules().into_iter().zip(elements.into_iter().cycle()) {
        let case = goldens_dir().join("dense-dca");
        let golden = Golden::load(&case);
        let mut device = Device::new(cuda(&case, options, element), &case, dtype);
        device.forks_and_swaps(&golden.input_ids[..PROMPT]);
        device.refuses_what_is_not_there();
    }
}
