//! Operands on the device, filled with random values.

use std::cell::Cell;
use std::sync::Arc;

use longhaul_backend::{KvLayout, RopeTables, StepInputs};
use longhaul_cuda::driver::{DevicePtr, Driver, Element, Memory};
use longhaul_cuda::kv::KvCache;
use longhaul_cuda::rope::Rope;
use longhaul_cuda::step::Step;
use longhaul_cuda::weights::{Experts, Matrix, Vector};
use longhaul_cuda::{Context, Result, Tensor};

/// Most bytes of operands of one case.
const MOST_BYTES: usize = 4 << 30;
/// Most sets of operands.
const MOST_COPIES: usize = 64;
/// Bytes of random values that are repeated over larger operands.
const PATTERN_BYTES: usize = 4 << 20;

/// Takes operands for a case.
pub(super) struct Operands<'a> {
    ctx: &'a Context,
    bf16: Memory,
    f32: Memory,
    sets: Cell<usize>,
}

impl<'a> Operands<'a> {
    /// Prepares the random patterns.
    pub(super) fn new(ctx: &'a Context) -> Result<Self> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        // Sum of two uniform numbers: random mantissas and signs, a few binades of exponents, no special values.
        let mut value = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..PATTERN_BYTES / 4).map(|_| value()).collect();
        let f32_bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let bf16_bytes: Vec<u8> =
            values.iter().chain(&values).flat_map(|v| half::bf16::from_f32(v * 0.1).to_le_bytes()).collect();
        Ok(Self {
            ctx,
            bf16: Memory::from_bytes(&ctx.driver, &bf16_bytes, "random values")?,
            f32: Memory::from_bytes(&ctx.driver, &f32_bytes, "random values")?,
            sets: Cell::new(1),
        })
    }

    pub(super) fn context(&self) -> &Context {
        self.ctx
    }

    fn driver(&self) -> &Arc<dyn Driver> {
        &self.ctx.driver
    }

    /// Sets of an operand of `bytes` bytes that together are twice the second-level cache.
    pub(super) fn copies(&self, bytes: usize) -> usize {
        let cache = self.driver().properties().l2_bytes as usize;
        let copies = (2 * cache / bytes.max(1) + 1).min(MOST_COPIES).min((MOST_BYTES / bytes.max(1)).max(1));
        self.sets.set(self.sets.get().max(copies));
        copies
    }

    /// Sets of the operand that has most, which a measurement takes in turn.
    pub(super) fn sets(&self) -> usize {
        self.sets.get()
    }

    fn fill(&self, address: DevicePtr, bytes: usize, element: Element) -> Result<()> {
        let pattern = if element == Element::F32 { &self.f32 } else { &self.bf16 };
        let mut at = 0;
        while at < bytes {
            let length = (bytes - at).min(pattern.bytes());
            self.driver().copy(address.offset(at), pattern.address(), length)?;
            at += length;
        }
        Ok(())
    }

    /// `count` tensors `[rows, cols]`.
    pub(super) fn tensors(
        &self,
        count: usize,
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<Vec<Tensor>> {
        self.sets.set(self.sets.get().max(count));
        (0..count)
            .map(|_| {
                let tensor = self.ctx.tensor("operand", rows, cols, element)?;
                self.fill(tensor.address(), rows * tensor.stride * element.size(), element)?;
                Ok(tensor)
            })
            .collect()
    }

    /// `count` bf16 matrices `[rows, cols]`.
    pub(super) fn matrices(&self, rows: usize, cols: usize, count: usize) -> Result<Vec<Matrix>> {
        (0..count.max(1))
            .map(|_| {
                let matrix = Matrix::uninitialised(self.driver(), rows, cols, Element::Bf16)?;
                self.fill(matrix.address(), rows * matrix.stride * 2, Element::Bf16)?;
                Ok(matrix)
            })
            .collect()
    }

    pub(super) fn vector(&self, len: usize) -> Result<Vector> {
        let host = longhaul_backend::HostTensor::from_f32(vec![len], &vec![0.5; len])
            .map_err(|e| longhaul_cuda::CudaError::shape("operand", e.to_string()))?;
        Vector::new(self.driver(), &[host])
    }

    pub(super) fn experts(&self, count: usize, intermediate: usize, hidden: usize) -> Result<Experts> {
        let experts = Experts::new(self.driver(), count, intermediate, hidden, Element::Bf16)?;
        self.fill(experts.gate_up(), experts.bytes(), Element::Bf16)?;
        Ok(experts)
    }

    pub(super) fn kv(&self, layout: KvLayout) -> Result<KvCache> {
        let kv = KvCache::new(self.driver(), layout)?;
        self.fill(kv.address(), kv.bytes(), kv.element())?;
        Ok(kv)
    }

    pub(super) fn rope(&self, tables: RopeTables) -> Result<Rope> {
        Rope::new(self.driver(), tables)
    }

    pub(super) fn step(&self, inputs: StepInputs) -> Result<Step> {
        let blocks: usize = inputs.sequences.iter().map(|s| s.block_table.len()).sum();
        let bytes = Step::capacity_bytes(inputs.rows(), inputs.sequences.len(), blocks);
        let memory = Memory::new(self.driver(), bytes, "step inputs")?;
        Step::upload(self.driver(), Arc::new(memory), inputs)
    }
}
