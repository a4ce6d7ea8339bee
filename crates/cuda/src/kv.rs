//! The paged KV pool on the device.
//!
//! Per layer K, then V, each `[blocks, kv_heads, block_size, head_dim]`: a block's tokens of one head lie together, so a tile
//! of keys is one contiguous run. Mirrored by `cuda/common/kv.h`.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longhaul_backend::{DType, HeadGroups, KvLayout};

use crate::driver::{DevicePtr, Driver, Element, Memory};
use crate::{CudaError, Result};

/// Mirror of `longhaul::KvParams`: one layer's pool.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct KvParams {
    /// K, `[blocks, kv_heads, block_size, head_dim]`.
    pub keys: DevicePtr,
    /// V, likewise.
    pub values: DevicePtr,
    /// f32 `[kv_heads]`: what a stored key is multiplied by (fp8 cache), or null for 1.
    pub key_scales: DevicePtr,
    /// f32 `[kv_heads]`, likewise for values.
    pub value_scales: DevicePtr,
    /// Query heads.
    pub query_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// Query heads of a KV head, at most.
    pub group: u32,
    /// Query heads of the first group that other ranks hold.
    pub skipped: u32,
}

/// The pool of all layers.
pub struct KvCache {
    layout: KvLayout,
    element: Element,
    memory: Memory,
    scales: Option<Memory>,
}

impl KvCache {
    /// Takes the pool's memory; the scales of an fp8 pool are 1. Blocks are poisoned under the emulator: what was never written must not be read.
    ///
    /// # Errors
    /// No memory, or a dtype that no kernel reads.
    pub fn new(driver: &Arc<dyn Driver>, layout: KvLayout) -> Result<Self> {
        let element = match layout.dtype {
            DType::F32 => Element::F32,
            DType::BF16 => Element::Bf16,
            DType::F8E4M3 => Element::E4m3,
            other => {
                return Err(CudaError::Unsupported(format!(
                    "a KV cache of {other}; use bfloat16, float32 or fp8_e4m3"
                )));
            }
        };
        Self::with_element(driver, layout, element, None)
    }

    /// As [`KvCache::new`] with any element. `scales` are per layer, then K and V, then KV head: `[layers, 2, kv_heads]`.
    ///
    /// # Errors
    /// No memory, or scales of the wrong count.
    pub fn with_element(
        driver: &Arc<dyn Driver>,
        layout: KvLayout,
        element: Element,
        scales: Option<&[f32]>,
    ) -> Result<Self> {
        if !layout.is_consistent() {
            return Err(CudaError::shape("kv_cache", format!("{layout:?}: query heads without a KV head")));
        }
        if let Some(scales) = scales
            && scales.len() != layout.layers * 2 * layout.kv_heads
        {
            return Err(CudaError::shape("kv_cache", format!("{} scales for {layout:?}", scales.len())));
        }
        let plane = layout.blocks * layout.kv_heads * layout.block_size * layout.head_dim * element.size();
        let memory = Memory::new(driver, 2 * layout.layers * plane, "KV pool")?;
        let scales =
            scales.map(|s| Memory::from_bytes(driver, bytemuck::cast_slice(s), "KV scales")).transpose()?;
        Ok(Self { layout, element, memory, scales })
    }

    /// Geometry of the pool. Its dtype is that of [`KvCache::element`] except for fp8.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Element of the cache.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Bytes of the pool.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Bytes of one block in one plane.
    pub fn block_bytes(&self) -> usize {
        let l = &self.layout;
        l.kv_heads * l.block_size * l.head_dim * self.element.size()
    }

    /// K and V of every layer.
    pub fn planes(&self) -> usize {
        2 * self.layout.layers
    }

    /// The whole pool's address.
    pub fn address(&self) -> DevicePtr {
        self.memory.address()
    }

    /// What kernels take for `layer`.
    pub fn layer(&self, layer: usize) -> KvParams {
        let l = &self.layout;
        let plane = self.memory.bytes() / (2 * l.layers);
        let scale = |kind: usize| {
            self.scales
                .as_ref()
                .map_or(DevicePtr::NULL, |s| s.address().offset((layer * 2 + kind) * l.kv_heads * 4))
        };
        KvParams {
            keys: self.memory.address().offset(2 * layer * plane),
            values: self.memory.address().offset((2 * layer + 1) * plane),
            key_scales: scale(0),
            value_scales: scale(1),
            query_heads: l.query_heads as u32,
            kv_heads: l.kv_heads as u32,
            head_dim: l.head_dim as u32,
            block_size: l.block_size as u32,
            group: l.group() as u32,
            skipped: match l.groups {
                HeadGroups::Even => 0,
                HeadGroups::Cut { skipped, .. } => skipped as u32,
            },
        }
    }
}
