//! Groups of threads of several nodes, which here are in one process and know each other only through messages: all that
//! threads of one node do, the same bits as theirs, and the end of a node.

mod common;

use std::ops::Range;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::suite::{Ranks, run};
use common::{Element, every_operation, value};
use longhaul_backend::{Collective, CollectiveError};
use longhaul_collective::{Link, Mirror, Options, Spanning, Threads};

/// Sends to all other nodes.
struct Wires(Mutex<Vec<Sender<Vec<u8>>>>);

impl Link for Wires {
    fn send(&self, message: Vec<u8>) {
        for wire in self.0.lock().unwrap().iter() {
            // A node that has gone hears nothing.
            let _ = wire.send(message.clone());
        }
    }
}

/// A node: its ranks, the mirror of the others, and which ranks they are.
struct Node {
    ranks: Vec<Spanning>,
    mirror: Mirror,
    local: Range<usize>,
}

/// Nodes of `sizes` ranks each, joined by a thread for each pair and direction; these end with the program.
fn nodes(sizes: &[usize], options: Options) -> Vec<Node> {
    let world_size = sizes.iter().sum();
    let wires: Vec<_> = sizes.iter().map(|_| Arc::new(Wires(Mutex::default()))).collect();
    let mut next = 0;
    let nodes: Vec<Node> = sizes
        .iter()
        .zip(&wires)
        .map(|(size, wires)| {
            let local = next..next + size;
            next += size;
            let link: Arc<dyn Link> = wires.clone();
            let (ranks, mirror) = Spanning::group(world_size, local.clone(), options, &link).unwrap();
            Node { ranks, mirror, local }
        })
        .collect();
    for (from, wires) in nodes.iter().zip(&wires) {
        for to in nodes.iter().filter(|to| to.local != from.local) {
            let (send, receive) = channel();
            wires.0.lock().unwrap().push(send);
            let (of, mirror) = (from.local.clone(), to.mirror.clone());
            std::thread::spawn(move || {
                for message in receive {
                    mirror.receive(&of, &message).unwrap();
                }
            });
        }
    }
    nodes
}

/// Two or three nodes, the last one larger or smaller than the others.
fn over_nodes(world_size: usize, options: Options) -> Ranks {
    let sizes = match world_size {
        1 => vec![1],
        2 => vec![1, 1],
        3 => vec![1, 2],
        4 => vec![2, 2],
        n => vec![2, 1, n - 3],
    };
    let nodes = nodes(&sizes, options);
    let (ranks, mirrors): (Vec<_>, Vec<_>) = nodes.into_iter().map(|node| (node.ranks, node.mirror)).unzip();
    let ranks = ranks.into_iter().flatten().map(|rank| Box::new(rank) as Box<dyn Collective>).collect();
    Ranks { ranks, keep: Box::new(mirrors), one_memory: false }
}

fn in_one_process(world_size: usize, options: Options) -> Ranks {
    let ranks = Threads::group(world_size, options).unwrap();
    let ranks = ranks.into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect();
    Ranks { ranks, keep: Box::new(()), one_memory: true }
}

suite!(over_nodes);

#[test]
fn the_bits_are_those_of_one_process() {
    for world_size in [2, 4, 7] {
        let sums = |group: Box<dyn Collective>| {
            let mut sums = Vec::new();
            for (round, length) in [5, 4096, 20_000].into_iter().enumerate() {
                sums.push(every_operation::<f32>(&*group, length, round));
                sums.push(every_operation::<half::bf16>(&*group, length, round));
                let mut values: Vec<f32> = (0..length)
                    .map(|i| 1e6f32.powi(i as i32 % 3) * value::<f32>(group.rank(), i, 9))
                    .collect();
                group.all_reduce(f32::values_mut(&mut values)).unwrap();
                sums.push(common::fingerprint(&values));
            }
            sums
        };
        let spread = run(over_nodes, world_size, Options::default(), sums);
        assert_eq!(spread, run(in_one_process, world_size, Options::default(), sums));
    }
}

#[test]
fn a_lost_node_ends_the_group_everywhere() {
    let options = Options { timeout: Duration::MAX, ..Options::default() };
    let nodes = nodes(&[1, 2, 1], options);
    let lost = CollectiveError::RankFailed { rank: 3, message: "its node closed the connection".into() };
    std::thread::scope(|scope| {
        let (ranks, mirrors): (Vec<_>, Vec<_>) =
            nodes.into_iter().map(|node| (node.ranks, node.mirror)).unzip();
        let mut ranks: Vec<Spanning> = ranks.into_iter().flatten().collect();
        let _stopped = ranks.pop();
        let waiting: Vec<_> =
            ranks.into_iter().map(|rank| scope.spawn(move || (rank.barrier(), rank))).collect();
        // The first node notices, and tells the others.
        mirrors[0].fail(&lost);
        for rank in waiting {
            assert_eq!(rank.join().unwrap().0.unwrap_err(), lost);
        }
    });
}

#[test]
fn the_pulse_shows_who_is_behind() {
    let options = Options { timeout: Duration::from_secs(60), ..Options::default() };
    let mut nodes = nodes(&[2, 1], options);
    let absent = nodes.pop().unwrap();
    let near = nodes.pop().unwrap();
    let pulse = near.ranks[0].pulse();
    std::thread::scope(|scope| {
        for rank in near.ranks {
            scope.spawn(move || rank.barrier().unwrap());
        }
        while pulse.exchanges() != [1, 1, 0] {
            std::thread::yield_now();
        }
        absent.ranks[0].barrier().unwrap();
        assert_eq!(absent.ranks[0].pulse().exchanges(), [1, 1, 1]);
    });
}
