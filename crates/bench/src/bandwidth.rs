use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// Bytes per thread: far beyond any cache.
const BYTES: usize = 256 << 20;
/// Bytes that a thread copies in a round at least: short copies are repeated.
const ROUND_BYTES: usize = 32 << 20;

/// Memory bandwidth in bytes per second that a plain copy reaches with `threads` threads (0 = all cores), counting bytes
/// read plus bytes written; the best of `rounds`.
pub fn copy_bandwidth(threads: usize, rounds: usize) -> f64 {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    copy_bandwidth_of(BYTES, if threads == 0 { available } else { threads }, rounds)
}

/// [`copy_bandwidth`] of a copy of `bytes` (at least 8), by each of `threads` threads between two buffers of its own: where
/// these fit a cache, the cache's.
pub fn copy_bandwidth_of(bytes: usize, threads: usize, rounds: usize) -> f64 {
    let (words, threads, rounds) = ((bytes / 8).max(1), threads.max(1), rounds.max(1));
    let copies = (ROUND_BYTES / (words * 8)).max(1);
    let start = Barrier::new(threads);
    let round_seconds = &|fill: u64| -> Vec<f64> {
        let (from, mut to) = (vec![fill; words], vec![0; words]);
        let mut round = || {
            start.wait();
            let start = Instant::now();
            for _ in 0..copies {
                to.copy_from_slice(black_box(&from));
                black_box(&to);
            }
            start.elapsed().as_secs_f64()
        };
        (0..rounds).map(|_| round()).collect()
    };
    let mut slowest = vec![0f64; rounds];
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..threads).map(|t| scope.spawn(move || round_seconds(t as u64 + 1))).collect();
        for seconds in threads.into_iter().filter_map(|thread| thread.join().ok()) {
            slowest.iter_mut().zip(seconds).for_each(|(slowest, s)| *slowest = slowest.max(s));
        }
    });
    let best = slowest.into_iter().fold(f64::INFINITY, f64::min);
    (2 * words * 8 * copies * threads) as f64 / best
}
