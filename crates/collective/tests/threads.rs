//! Groups of threads of one process.

mod common;

use common::suite::Ranks;
use longhaul_backend::Collective;
use longhaul_collective::{Options, Threads};

fn threads(world_size: usize, options: Options) -> Ranks {
    let ranks = Threads::group(world_size, options).unwrap();
    let ranks = ranks.into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect();
    Ranks { ranks, keep: Box::new(()), one_memory: true }
}

suite!(threads);

#[test]
fn sizes_out_of_range_are_refused() {
    assert!(Threads::group(0, Options::default()).is_err());
    assert!(Threads::group(65, Options::default()).is_err());
}
