use std::time::Instant;

/// Bytes per thread: far beyond any cache.
const BYTES: usize = 256 << 20;

/// Memory bandwidth in bytes per second that a plain copy reaches with `threads` threads (0 = all cores), counting bytes
/// read plus bytes written; the best of `rounds`.
pub fn copy_bandwidth(threads: usize, rounds: usize) -> f64 {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 { available } else { threads };
    let mut buffers: Vec<(Vec<u64>, Vec<u64>)> =
        (0..threads).map(|t| (vec![t as u64 + 1; BYTES / 8], vec![0; BYTES / 8])).collect();
    let mut best = f64::INFINITY;
    for _ in 0..rounds.max(1) {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in &mut buffers {
                scope.spawn(|| to.copy_from_slice(std::hint::black_box(from)));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    (2 * BYTES * threads) as f64 / best
}
