use crate::DType;

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
}
