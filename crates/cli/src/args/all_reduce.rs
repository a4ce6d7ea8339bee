//! `--all-reduce`.

use clap::ValueEnum;
use longhaul_engine::AllReduce;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AllReduceArg {
    Auto,
    Peer,
    Nccl,
    Host,
}

impl From<AllReduceArg> for AllReduce {
    fn from(way: AllReduceArg) -> Self {
        match way {
            AllReduceArg::Auto => AllReduce::Auto,
            AllReduceArg::Peer => AllReduce::Peer,
            AllReduceArg::Nccl => AllReduce::Nccl,
            AllReduceArg::Host => AllReduce::Host,
        }
    }
}
