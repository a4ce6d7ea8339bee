use std::ops::Range;

/// Dual Chunk Attention's integers (arXiv 2402.17463; `docs/architecture.md`, "Positions"): key positions repeat every `len()` tokens, no
/// query is ever rotated beyond `chunk_size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    /// `C`: the largest rotated query position.
    pub chunk_size: u32,
    /// `w`: rows at the start of a chunk that see the previous chunk at true distance; `w < C`.
    pub local_size: u32,
}

impl Chunking {
    /// `L = C - w`: tokens of a chunk, period of the key positions.
    pub fn len(self) -> u32 {
        self.chunk_size - self.local_size
    }

    /// Always false: a chunk holds at least one token because `w < C`.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Table row that rotates the query at `position` against keys of chunk `key_chunk` (`docs/architecture.md`).
    pub fn query_row(self, position: u32, key_chunk: u32) -> u32 {
        let (chunk, offset) = (position / self.len(), position % self.len());
        match chunk.saturating_sub(key_chunk) {
            0 => offset,
            1 => (offset + self.len()).min(self.chunk_size),
            _ => (2 * self.len() - 1).min(self.chunk_size),
        }
    }
}

/// A run of keys that one query row meets under one rotation of the query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySegment {
    /// Absolute key positions.
    pub keys: Range<u32>,
    /// Row of the cos/sin table for the query.
    pub query_row: u32,
}

/// Rotation tables and the position scheme of a model: all a device needs to know about RoPE, YaRN and DCA.
///
/// NeoX pairing `(d, d + head_dim/2)`; angles are computed in f64 and stored as f32. No temperature is baked in: YaRN's
/// constant and the length scale arrive per row as [`crate::StepInputs::logit_scales`].
#[derive(Debug, Clone)]
pub struct RopeTables {
    /// `head_dim / 2`.
    pub half_dim: usize,
    /// Positions in the tables: `C + 1` under DCA, the context length otherwise.
    pub rows: usize,
    /// cos, `[rows, half_dim]`.
    pub cos: Vec<f32>,
    /// sin, `[rows, half_dim]`.
    pub sin: Vec<f32>,
    /// Dual Chunk Attention, or `None` for plain positions.
    pub chunking: Option<Chunking>,
}

impl RopeTables {
    /// Table row at which the key at `position` is rotated before it enters the cache.
    pub fn key_row(&self, position: u32) -> u32 {
        self.chunking.map_or(position, |c| position % c.len())
    }

    /// The rotations that the query at `position` needs, far keys first. The segments cover `0..=position` exactly once:
    /// the mask of DCA is the causal mask (`docs/architecture.md`), so plain attention is the case of one segment.
    pub fn query_segments(&self, position: u32) -> Vec<KeySegment> {
        let Some(chunking) = self.chunking else {
            return vec![KeySegment { keys: 0..position + 1, query_row: position }];
        };
        let len = chunking.len();
        let chunk = position / len;
        let intra = chunk * len;
        let previous = chunk.saturating_sub(1) * len;
        let mut segments: Vec<KeySegment> = Vec::with_capacity(3);
        for keys in [0..previous, previous..intra, intra..position + 1] {
            if keys.is_empty() {
                continue;
            }
            let query_row = chunking.query_row(position, keys.start / len);
            match segments.last_mut() {
                // Rows with offset >= w have the same operand for both: one segment, one rotation less.
                Some(last) if last.query_row == query_row => last.keys.end = keys.end,
                _ => segments.push(KeySegment { keys, query_row }),
            }
        }
        segments
    }

    /// cos and sin of table row `row`, `half_dim` each; `None` beyond the table.
    pub fn row(&self, row: u32) -> Option<(&[f32], &[f32])> {
        let start = (row as usize).checked_mul(self.half_dim)?;
        let range = start..start.checked_add(self.half_dim)?;
        Some((self.cos.get(range.clone())?, self.sin.get(range)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(chunking: Option<Chunking>) -> RopeTables {
        RopeTables { half_dim: 1, rows: 8, cos: vec![1.0; 8], sin: vec![0.0; 8], chunking }
    }

    /// Relative distance of every pair, from the segments.
    fn distances(tables: &RopeTables, position: u32) -> Vec<u32> {
        tables
            .query_segments(position)
            .into_iter()
            .flat_map(|s| s.keys.map(move |k| (s.query_row, k)))
            .map(|(query, key)| query - tables.key_row(key))
            .collect()
    }

    /// Figure 5(a) of the Qwen2.5-1M report (C = 7, w = 2), as printed in the spec.
    #[test]
    fn distances_match_the_published_figure() {
        let t = tables(Some(Chunking { chunk_size: 7, local_size: 2 }));
        assert_eq!(distances(&t, 4), [4, 3, 2, 1, 0]);
        assert_eq!(distances(&t, 5), [5, 4, 3, 2, 1, 0]);
        assert_eq!(distances(&t, 7), [7, 6, 5, 4, 3, 2, 1, 0]);
        assert_eq!(distances(&t, 8), [7, 6, 5, 4, 3, 3, 2, 1, 0]);
        assert_eq!(distances(&t, 10), [7, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0]);
        assert_eq!(distances(&t, 12), [7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 2, 1, 0]);
        assert_eq!(distances(&t, 14), [7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 4, 3, 2, 1, 0]);
    }

    #[test]
    fn segments_cover_the_causal_range_once_and_merge_equal_operands() {
        for (chunk_size, local_size) in [(7, 2), (7, 0), (7, 6), (80, 16), (1, 0)] {
            let t = tables(Some(Chunking { chunk_size, local_size }));
            for position in 0..300 {
                let segments = t.query_segments(position);
                let covered: Vec<u32> = segments.iter().flat_map(|s| s.keys.clone()).collect();
                assert_eq!(covered, (0..=position).collect::<Vec<_>>());
                assert!(segments.windows(2).all(|w| w[0].query_row != w[1].query_row));
                assert!(segments.len() <= 3);
            }
        }
    }

    #[test]
    fn plain_positions_are_one_segment() {
        assert_eq!(tables(None).query_segments(9), [KeySegment { keys: 0..10, query_row: 9 }]);
    }
}
