use std::collections::HashSet;

use crate::{DType, Error, Result};

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

    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
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

    #[test]
    fn copies_that_depend_on_their_order_are_errors() {
        let layout = KvLayout {
            layers: 1,
            query_heads: 1,
            kv_heads: 1,
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
