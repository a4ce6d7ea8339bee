use std::collections::HashSet;
use std::ops::Range;

use crate::{DType, Error, Result};

/// How the query heads of a rank fall on its KV heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadGroups {
    /// Every KV head serves equally many query heads.
    #[default]
    Even,
    /// The rank holds a run of query heads that begins or ends inside a group of the model: local query head `h` reads KV head
    /// `(h + skipped) / size`. Only with two KV heads or more, since a single one serves all heads in any case.
    Cut {
        /// Query heads of a whole group.
        size: usize,
        /// Query heads of the first group that other ranks hold.
        skipped: usize,
    },
}

/// Geometry of the paged KV pool of one rank. The device decides how a block is laid out inside.
///
/// K is stored rotated at `position mod L` ([`crate::Chunking::len`]; plain RoPE: at `position`), unscaled; V as computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Transformer layers.
    pub layers: usize,
    /// Query heads of this rank.
    pub query_heads: usize,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Which query heads read which KV head.
    pub groups: HeadGroups,
    /// Elements of one head.
    pub head_dim: usize,
    /// Tokens of one block; divides the chunk length of Dual Chunk Attention.
    pub block_size: usize,
    /// Blocks in the pool.
    pub blocks: usize,
    /// Element type of the cache.
    pub dtype: DType,
}

impl KvLayout {
    /// Bytes of K and V of one token over all layers.
    pub fn bytes_per_token(&self) -> u64 {
        2 * (self.layers * self.kv_heads * self.head_dim * self.dtype.size()) as u64
    }

    /// Bytes of the whole pool.
    pub fn bytes(&self) -> u64 {
        self.bytes_per_token() * (self.blocks * self.block_size) as u64
    }

    /// Blocks that `tokens` tokens occupy.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Query heads that share one KV head, at most.
    pub fn group(&self) -> usize {
        match self.groups {
            HeadGroups::Even => self.query_heads / self.kv_heads.max(1),
            HeadGroups::Cut { size, .. } => size,
        }
    }

    /// The query heads that read `kv_head`.
    pub fn query_heads_of(&self, kv_head: usize) -> Range<usize> {
        let (size, skipped) = match self.groups {
            HeadGroups::Even => (self.group(), 0),
            HeadGroups::Cut { size, skipped } => (size, skipped),
        };
        let start = (kv_head * size).saturating_sub(skipped);
        let end = ((kv_head + 1) * size).saturating_sub(skipped);
        start.min(self.query_heads)..end.min(self.query_heads)
    }

    /// Whether every query head reads a KV head that is there, and no KV head is idle. A rank may have neither.
    pub fn is_consistent(&self) -> bool {
        let reached = match self.groups {
            HeadGroups::Even if self.kv_heads == 0 => self.query_heads == 0,
            HeadGroups::Even => self.query_heads.is_multiple_of(self.kv_heads),
            HeadGroups::Cut { size, skipped } => {
                skipped < size && self.query_heads + skipped <= self.kv_heads * size
            }
        };
        reached && (0..self.kv_heads).all(|kv_head| !self.query_heads_of(kv_head).is_empty())
    }

    /// Checks that `blocks` are in the pool.
    ///
    /// # Errors
    /// [`Error::Blocks`].
    pub fn check_blocks(&self, blocks: &[u32]) -> Result<()> {
        match blocks.iter().find(|&&block| block as usize >= self.blocks) {
            Some(block) => Err(Error::Blocks(format!("block {block} is not in the pool of {}", self.blocks))),
            None => Ok(()),
        }
    }

    /// Checks (source, destination) pairs of a copy: all are in the pool, and no destination is another pair's destination
    /// or any pair's source, so that the order of the copies does not matter.
    ///
    /// # Errors
    /// [`Error::Blocks`].
    pub fn check_copies(&self, pairs: &[(u32, u32)]) -> Result<()> {
        let (sources, destinations): (Vec<u32>, Vec<u32>) = pairs.iter().copied().unzip();
        self.check_blocks(&sources)?;
        self.check_distinct(&destinations)?;
        let sources: HashSet<u32> = sources.into_iter().collect();
        match destinations.iter().find(|block| sources.contains(block)) {
            Some(block) => Err(Error::Blocks(format!("block {block} is copied from and to at once"))),
            None => Ok(()),
        }
    }

    /// Checks a write of `bytes` to `blocks` of `bytes_per_block` each.
    ///
    /// # Errors
    /// [`Error::Blocks`] for blocks outside the pool or named twice, or a wrong number of bytes.
    pub fn check_writes(&self, blocks: &[u32], bytes: usize, bytes_per_block: usize) -> Result<()> {
        self.check_distinct(blocks)?;
        if blocks.len().checked_mul(bytes_per_block) != Some(bytes) {
            let count = blocks.len();
            return Err(Error::Blocks(format!("{bytes} bytes for {count} blocks of {bytes_per_block}")));
        }
        Ok(())
    }

    fn check_distinct(&self, destinations: &[u32]) -> Result<()> {
        self.check_blocks(destinations)?;
        let mut seen = HashSet::with_capacity(destinations.len());
        match destinations.iter().find(|&&block| !seen.insert(block)) {
            Some(block) => Err(Error::Blocks(format!("block {block} is written twice"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(query_heads: usize, kv_heads: usize, groups: HeadGroups) -> KvLayout {
        let dtype = DType::F32;
        KvLayout { layers: 1, query_heads, kv_heads, groups, head_dim: 4, block_size: 16, blocks: 1, dtype }
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // one KV head, read by a range of heads
    fn every_query_head_reads_one_kv_head() {
        let cut = |size, skipped| HeadGroups::Cut { size, skipped };
        let cases = [
            (28, 4, HeadGroups::Even, vec![0..7, 7..14, 14..21, 21..28]),
            (3, 1, HeadGroups::Even, vec![0..3]),
            (0, 0, HeadGroups::Even, vec![]),
            (10, 2, cut(7, 0), vec![0..7, 7..10]),
            (9, 2, cut(7, 3), vec![0..4, 4..9]),
            (18, 3, cut(8, 2), vec![0..6, 6..14, 14..18]),
        ];
        for (query_heads, kv_heads, groups, expected) in cases {
            let layout = layout(query_heads, kv_heads, groups);
            assert!(layout.is_consistent(), "{layout:?}");
            let found: Vec<_> = (0..kv_heads).map(|k| layout.query_heads_of(k)).collect();
            assert_eq!(found, expected, "{layout:?}");
        }
        let broken = [(10, 4, HeadGroups::Even), (3, 0, HeadGroups::Even), (0, 1, HeadGroups::Even)];
        let cut_short = [(15, 2, cut(7, 0)), (7, 2, cut(7, 0)), (7, 2, cut(7, 7))];
        for (query_heads, kv_heads, groups) in broken.into_iter().chain(cut_short) {
            let layout = layout(query_heads, kv_heads, groups);
            assert!(!layout.is_consistent(), "{layout:?}");
        }
    }

    #[test]
    fn copies_that_depend_on_their_order_are_errors() {
        let layout = KvLayout {
            layers: 1,
            query_heads: 1,
            kv_heads: 1,
            groups: HeadGroups::Even,
            head_dim: 2,
            block_size: 1,
            blocks: 4,
            dtype: DType::F32,
        };
        layout.check_copies(&[(0, 1), (0, 2)]).unwrap();
        let bad = |pairs: &[(u32, u32)], expected: &str| {
            let message = layout.check_copies(pairs).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        bad(&[(0, 1), (2, 1)], "block 1 is written twice");
        bad(&[(0, 1), (1, 2)], "block 1 is copied from and to");
        bad(&[(3, 3)], "block 3 is copied from and to");
        bad(&[(4, 0)], "block 4 is not in the pool of 4");
        bad(&[(0, u32::MAX)], "not in the pool");
        layout.check_writes(&[3, 1], 32, 16).unwrap();
        assert!(layout.check_writes(&[3, 1], 31, 16).is_err());
        assert!(layout.check_writes(&[3, 3], 32, 16).is_err());
    }
}
