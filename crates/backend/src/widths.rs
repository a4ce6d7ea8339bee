/// Widths of a model on one rank, in elements: what decides the memory of a step. Any but `hidden` may be 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Widths {
    /// Residual stream.
    pub hidden: usize,
    /// q, k and v together.
    pub qkv: usize,
    /// q alone.
    pub query: usize,
    /// q as if every KV head served a whole group: more than `query` where the rank's share of heads cuts a group.
    pub whole_groups: usize,
    /// Columns of the dense MLP or of the shared expert, whichever are more.
    pub intermediate: usize,
    /// Columns of one routed expert; 0 without experts.
    pub expert_intermediate: usize,
    /// Routed experts of all ranks.
    pub experts: usize,
    /// Experts a token visits.
    pub top_k: usize,
    /// Rows of the output head on this rank.
    pub vocabulary: usize,
    /// Rows of the whole output head: columns of gathered logits.
    pub whole_vocabulary: usize,
}
