//! The KV blocks of the pool, handed out and taken back.

use crate::{EngineError, Result};

/// Free blocks of the KV pool.
#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Vec<u32>,
    blocks: usize,
}

impl BlockPool {
    pub(crate) fn new(blocks: usize) -> Self {
        // Popped from the end: low blocks first, so a short request touches the same memory every time.
        Self { free: (0..blocks as u32).rev().collect(), blocks }
    }

    /// All blocks.
    pub(crate) fn len(&self) -> usize {
        self.blocks
    }

    /// `count` blocks, or an error that says how many there are.
    pub(crate) fn allocate(&mut self, count: usize) -> Result<Vec<u32>> {
        if count > self.free.len() {
            return Err(EngineError::Parameter {
                name: "prompt",
                message: format!("needs {count} KV blocks, {} are free", self.free.len()),
            });
        }
        Ok(self.free.split_off(self.free.len() - count).into_iter().rev().collect())
    }

    /// Takes blocks back.
    pub(crate) fn release(&mut self, blocks: Vec<u32>) {
        self.free.extend(blocks.into_iter().rev());
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_in_the_same_order() {
        let mut pool = BlockPool::new(5);
        let first = pool.allocate(3).unwrap();
        assert_eq!(first, [0, 1, 2]);
        assert!(pool.allocate(3).is_err());
        assert_eq!(pool.free(), 2);
        pool.release(first);
        assert_eq!(pool.allocate(5).unwrap(), [0, 1, 2, 3, 4]);
    }
}
