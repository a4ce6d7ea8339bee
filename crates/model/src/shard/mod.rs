//! The shard plan: which part of every weight each rank of a tensor-parallel group holds, as data.
//!
//! Any number of ranks works for any model. Query heads are dealt whole; a KV head that several ranks need is held by each
//! of them; MLP columns are cut at multiples of 16 or of the quantisation group; experts are cut by columns or dealt
//! whole; embedding and output head are cut by vocabulary rows; norms and router are everywhere. Shares may be uneven, and a
//! rank may hold nothing of a matrix: it still takes part in every collective.
mod columns;
mod heads;
mod plan;
#[cfg(test)]
mod tests;

pub use plan::{RankShard, ShardOptions, ShardPlan};
