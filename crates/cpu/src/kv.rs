//! The paged KV cache in host memory, laid out for the attention kernel.

use longhaul_backend::{DType, Error, KvLayout, Result};

use crate::linear::{pair, round};

/// Lanes that every row is padded to, so that no kernel needs a masked load.
const PAD: usize = 16;

/// Paged K and V of all layers, f32 or bf16.
///
/// f32: a block of K is `[kv_heads][head_dim][block_size]` (keys along the vector lanes, so a tile of scores needs no
/// horizontal sums), a block of V is `[kv_heads][block_size][head_dim]`. bf16: the same with pairs of neighbours in one
/// 32-bit word, the first in the low half: along head_dim in K, along the keys in V. The last axis is padded to 16.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    layers: Vec<LayerKv>,
}

#[derive(Debug)]
struct LayerKv {
    k: Words,
    v: Words,
}

/// f32 values or pairs of bf16.
#[derive(Debug)]
enum Words {
    F32(Vec<f32>),
    Bf16(Vec<u32>),
}

impl Words {
    fn new(dtype: DType, count: usize, layout: &KvLayout) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Words::F32(zeroed(count, layout)?)),
            DType::BF16 => Ok(Words::Bf16(zeroed(count, layout)?)),
            DType::F16 | DType::F8E4M3 => Err(Error::UnsupportedDType { op: "kv_cache", dtype }),
        }
    }
}

/// Zeroed memory whose pages are committed when first written.
fn zeroed<T: Clone + Default>(count: usize, layout: &KvLayout) -> Result<Vec<T>> {
    // `try_reserve` first: a pool that cannot be had must be an error, not an abort.
    let mut probe: Vec<T> = Vec::new();
    probe.try_reserve_exact(count).map_err(|_| Error::OutOfMemory {
        what: format!("the KV cache of {} tokens", layout.blocks * layout.block_size),
        bytes: layout.bytes(),
    })?;
    drop(probe);
    Ok(vec![T::default(); count])
}

/// One KV head of one block.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KvTile<'a> {
    /// k `[head_dim][key_stride]`, v `[block_size][value_stride]`
    F32 { k: &'a [f32], v: &'a [f32] },
    /// k `[head_dim / 2][key_stride]`, v `[ceil(block_size / 2)][value_stride]`, words of two values
    Bf16 { k: &'a [u32], v: &'a [u32] },
}

impl KvCache {
    /// Takes the pool.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] for anything but f32 and bf16, [`Error::OutOfMemory`] when the pool cannot be had.
    pub fn new(layout: KvLayout) -> Result<Self> {
        if !layout.is_consistent() || layout.block_size == 0 || !layout.head_dim.is_multiple_of(2) {
            return Err(Error::shape("kv_cache", format!("{layout:?} is not a layout")));
        }
        let heads = layout.blocks * layout.kv_heads;
        let (k, v) = (key_words(&layout), value_words(&layout));
        let layers = (0..layout.layers)
            .map(|_| {
                Ok(LayerKv {
                    k: Words::new(layout.dtype, heads * k, &layout)?,
                    v: Words::new(layout.dtype, heads * v, &layout)?,
                })
            })
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
        let (k, v) = (key_words(&self.layout), value_words(&self.layout));
        let (k, v) = (index * k..(index + 1) * k, index * v..(index + 1) * v);
        match (&kv.k, &kv.v) {
            (Words::F32(keys), Words::F32(values)) => {
                Some(KvTile::F32 { k: keys.get(k)?, v: values.get(v)? })
            }
            (Words::Bf16(keys), Words::Bf16(values)) => {
                Some(KvTile::Bf16 { k: keys.get(k)?, v: values.get(v)? })
            }
            _ => None,
        }
    }

    /// Writes one rotated key and one value of `kv_head` to `slot` of `block`; both hold `head_dim` values. Slots of a block
    /// are written in ascending order.
    pub(crate) fn write(
        &mut self,
        layer: usize,
        (block, slot): (usize, usize),
        kv_head: usize,
        key: &[f32],
        value: &[f32],
    ) -> Result<()> {
        let (key_stride, value_stride) = (self.key_stride(), self.value_stride());
        let (k, v) = (key_words(&self.layout), value_words(&self.layout));
        let index = block * self.layout.kv_heads + kv_head;
        let (k, v) = (index * k..(index + 1) * k, index * v..(index + 1) * v);
        let outside =
            || Error::Step(format!("block {block} slot {slot} layer {layer} is outside the KV pool"));
        if slot >= self.layout.block_size {
            return Err(outside());
        }
        let kv = self.layers.get_mut(layer).ok_or_else(outside)?;
        match &mut kv.k {
            Words::F32(keys) => {
                let keys = keys.get_mut(k).ok_or_else(outside)?;
                for (line, x) in keys.chunks_exact_mut(key_stride).zip(key) {
                    line[slot] = *x;
                }
            }
            Words::Bf16(keys) => {
                let keys = keys.get_mut(k).ok_or_else(outside)?;
                for (line, [a, b]) in keys.chunks_exact_mut(key_stride).zip(key.as_chunks::<2>().0) {
                    line[slot] = pair(*a, *b);
                }
            }
        }
        match &mut kv.v {
            Words::F32(values) => {
                let values = values.get_mut(v).ok_or_else(outside)?;
                values[slot * value_stride..][..value.len()].copy_from_slice(value);
            }
            Words::Bf16(values) => {
                let values = values.get_mut(v).ok_or_else(outside)?;
                for (word, x) in values[slot / 2 * value_stride..].iter_mut().zip(value) {
                    // The first of a pair clears the second: a stale NaN there would survive a weight of zero.
                    *word = if slot.is_multiple_of(2) { round(*x) >> 16 } else { *word & 0xffff | round(*x) };
                }
            }
        }
        Ok(())
    }

    /// Copies K and V of all layers from the first to the second block of each pair.
    ///
    /// # Errors
    /// [`Error::Blocks`] ([`KvLayout::check_copies`]).
    pub(crate) fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        self.layout.check_copies(pairs)?;
        let words = self.block_words();
        for layer in &mut self.layers {
            for (plane, words) in [&mut layer.k, &mut layer.v].into_iter().zip(words) {
                for &(from, to) in pairs {
                    let (from, to) = (from as usize * words, to as usize * words);
                    match plane {
                        Words::F32(values) => values.copy_within(from..from + words, to),
                        Words::Bf16(values) => values.copy_within(from..from + words, to),
                    }
                }
            }
        }
        Ok(())
    }

    /// The contents of `blocks`, one after the other: for each its planes (K, then V, of each layer).
    ///
    /// # Errors
    /// [`Error::Blocks`] for a block outside the pool.
    pub(crate) fn read_blocks(&self, blocks: &[u32]) -> Result<Vec<u8>> {
        self.layout.check_blocks(blocks)?;
        let words = self.block_words();
        let mut out = Vec::with_capacity(blocks.len() * self.bytes_per_block());
        for &block in blocks {
            for layer in &self.layers {
                for (plane, words) in [&layer.k, &layer.v].into_iter().zip(words) {
                    let bytes: &[u8] = match plane {
                        Words::F32(values) => bytemuck::cast_slice(values),
                        Words::Bf16(values) => bytemuck::cast_slice(values),
                    };
                    let start = block as usize * words * 4;
                    out.extend_from_slice(&bytes[start..start + words * 4]);
                }
            }
        }
        Ok(out)
    }

    /// Writes what [`KvCache::read_blocks`] returned to `blocks`.
    ///
    /// # Errors
    /// [`Error::Blocks`] ([`KvLayout::check_writes`]).
    pub(crate) fn write_blocks(&mut self, blocks: &[u32], bytes: &[u8]) -> Result<()> {
        self.layout.check_writes(blocks, bytes.len(), self.bytes_per_block())?;
        let words = self.block_words();
        let mut rest = bytes;
        for &block in blocks {
            for layer in &mut self.layers {
                for (plane, words) in [&mut layer.k, &mut layer.v].into_iter().zip(words) {
                    let to: &mut [u8] = match plane {
                        Words::F32(values) => bytemuck::cast_slice_mut(values),
                        Words::Bf16(values) => bytemuck::cast_slice_mut(values),
                    };
                    let (from, behind) = rest.split_at(words * 4);
                    to[block as usize * words * 4..][..words * 4].copy_from_slice(from);
                    rest = behind;
                }
            }
        }
        Ok(())
    }

    /// Words of a block of K and of V in one layer.
    fn block_words(&self) -> [usize; 2] {
        [key_words(&self.layout), value_words(&self.layout)].map(|words| words * self.layout.kv_heads)
    }

    fn bytes_per_block(&self) -> usize {
        self.layers.len() * self.block_words().iter().sum::<usize>() * 4
    }

    /// Words between two lines of a K tile.
    pub(crate) fn key_stride(&self) -> usize {
        key_stride(&self.layout)
    }

    /// Words between two lines of a V tile.
    pub(crate) fn value_stride(&self) -> usize {
        value_stride(&self.layout)
    }

    /// Fills the whole pool with NaN, to prove in tests that nothing unwritten is read.
    #[cfg(test)]
    pub(crate) fn poison(&mut self) {
        for layer in &mut self.layers {
            for words in [&mut layer.k, &mut layer.v] {
                match words {
                    Words::F32(values) => values.fill(f32::NAN),
                    Words::Bf16(pairs) => pairs.fill(0x7fc0_7fc0),
                }
            }
        }
    }
}

fn key_stride(layout: &KvLayout) -> usize {
    layout.block_size.next_multiple_of(PAD)
}

fn value_stride(layout: &KvLayout) -> usize {
    layout.head_dim.next_multiple_of(PAD)
}

/// Words of one head of a K block.
fn key_words(layout: &KvLayout) -> usize {
    let lines = if layout.dtype == DType::BF16 { layout.head_dim / 2 } else { layout.head_dim };
    lines * key_stride(layout)
}

/// Words of one head of a V block.
fn value_words(layout: &KvLayout) -> usize {
    let lines = if layout.dtype == DType::BF16 { layout.block_size.div_ceil(2) } else { layout.block_size };
    lines * value_stride(layout)
}
