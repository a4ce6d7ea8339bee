//! The paged KV cache in host memory, laid out for the attention kernel.

use longhaul_backend::{DType, Error, KvLayout, Result};

/// Lanes that every row is padded to, so that no kernel needs a masked load.
const PAD: usize = 16;

/// Paged K and V of all layers, f32.
///
/// A block of K is `[kv_heads][head_dim][block_size]` (keys along the vector lanes, so a tile of scores needs no
/// horizontal sums), a block of V is `[kv_heads][block_size][head_dim]`; the last axis of each is padded to 16.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    layers: Vec<LayerKv>,
}

#[derive(Debug)]
struct LayerKv {
    k: Vec<f32>,
    v: Vec<f32>,
}

/// One KV head of one block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvTile<'a> {
    /// `[head_dim][key_stride]`
    pub k: &'a [f32],
    /// `[block_size][value_stride]`
    pub v: &'a [f32],
}

impl KvCache {
    /// Takes the pool. Pages are committed when first written.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] for anything but f32, [`Error::OutOfMemory`] when the pool cannot be had.
    pub fn new(layout: KvLayout) -> Result<Self> {
        if layout.dtype != DType::F32 {
            return Err(Error::UnsupportedDType { op: "kv_cache", dtype: layout.dtype });
        }
        if layout.kv_heads == 0 || layout.query_heads % layout.kv_heads != 0 || layout.block_size == 0 {
            return Err(Error::shape("kv_cache", format!("{layout:?} is not a layout")));
        }
        let zeros = |elements: usize| -> Result<Vec<f32>> {
            // `try_reserve` first: a pool that cannot be had must be an error, not an abort.
            let mut probe: Vec<f32> = Vec::new();
            probe.try_reserve_exact(elements).map_err(|_| Error::OutOfMemory {
                what: format!("the KV cache of {} tokens", layout.blocks * layout.block_size),
                bytes: layout.bytes(),
            })?;
            drop(probe);
            Ok(vec![0.0; elements])
        };
        let heads = layout.blocks * layout.kv_heads;
        let (k, v) = (layout.head_dim * key_stride(&layout), layout.block_size * value_stride(&layout));
        let layers = (0..layout.layers)
            .map(|_| Ok(LayerKv { k: zeros(heads * k)?, v: zeros(heads * v)? }))
            .collect::<Result<_>>()?;
        Ok(Self { layout, layers })
    }

    /// The pool's geometry.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The tile of `kv_head` in `block`.
    pub(crate) fn tile(&self, layer: usize, block: usize, kv_head: usize) -> Option<KvTile<'_>> {
        let kv = self.layers.get(layer)?;
        let index = block * self.layout.kv_heads + kv_head;
        let (k, v) = (self.layout.head_dim * self.key_stride(), self.layout.block_size * self.value_stride());
        Some(KvTile { k: kv.k.get(index * k..(index + 1) * k)?, v: kv.v.get(index * v..(index + 1) * v)? })
    }

    /// Writes one rotated key and one value of `kv_head` to `slot` of `block`; both hold `head_dim` values.
    pub(crate) fn write(
        &mut self,
        layer: usize,
        (block, slot): (usize, usize),
        kv_head: usize,
        key: &[f32],
        value: &[f32],
    ) -> Result<()> {
        let (key_stride, value_stride) = (self.key_stride(), self.value_stride());
        let index = block * self.layout.kv_heads + kv_head;
        let (k, v) = (self.layout.head_dim * key_stride, self.layout.block_size * value_stride);
        let outside = || Error::Step(format!("block {block} slot {slot} layer {layer} is outside the KV pool"));
        let kv = self.layers.get_mut(layer).ok_or_else(outside)?;
        let keys = kv.k.get_mut(index * k..(index + 1) * k).ok_or_else(outside)?;
        for (d, x) in key.iter().enumerate() {
            *keys.get_mut(d * key_stride + slot).ok_or_else(outside)? = *x;
        }
        let values = kv.v.get_mut(index * v..(index + 1) * v).ok_or_else(outside)?;
        let row = values.get_mut(slot * value_stride..).and_then(|r| r.get_mut(..value.len()));
        row.ok_or_else(outside)?.copy_from_slice(value);
        Ok(())
    }

    /// Elements between two dimensions of a K tile.
    pub(crate) fn key_stride(&self) -> usize {
        key_stride(&self.layout)
    }

    /// Elements between two keys of a V tile.
    pub(crate) fn value_stride(&self) -> usize {
        value_stride(&self.layout)
    }

    /// Fills the whole pool, to prove in tests that nothing unwritten is read.
    #[cfg(test)]
    pub(crate) fn poison(&mut self, value: f32) {
        for layer in &mut self.layers {
            layer.k.fill(value);
            layer.v.fill(value);
        }
    }
}

fn key_stride(layout: &KvLayout) -> usize {
    layout.block_size.next_multiple_of(PAD)
}

fn value_stride(layout: &KvLayout) -> usize {
    layout.head_dim.next_multiple_of(PAD)
}
