use crate::Result;

/// Collective operations among the ranks of a tensor-parallel group, on host memory.
pub trait Collective: Send + Sync {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;
    /// Ranks in the group.
    fn world_size(&self) -> usize;
    /// Replaces `values` by the element-wise sum over all ranks, added in rank order, so all ranks hold the same bits.
    ///
    /// # Errors
    /// When another rank failed or left.
    fn all_reduce(&self, values: &mut [f32]) -> Result<()>;
}

/// The group of one rank: every operation is the identity.
#[derive(Debug, Clone, Copy, Default)]
pub struct Single;

impl Collective for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
}
