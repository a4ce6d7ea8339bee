//! Sleeping until a word in shared memory changes, between threads and between processes.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Sleeps until `word` is no longer `seen`, for `at_most` at the longest; may return early.
#[cfg(target_os = "linux")]
pub fn sleep_while(word: &AtomicU32, seen: u32, at_most: Duration) {
    use rustix::thread::futex;
    let timeout = futex::Timespec {
        tv_sec: at_most.as_secs().min(3600) as i64,
        tv_nsec: at_most.subsec_nanos().into(),
    };
    // Woken, interrupted, timed out or changed before: the caller looks again in every case.
    let _ = futex::wait(word, futex::Flags::empty(), seen, Some(&timeout));
}

/// Wakes everybody who sleeps on `word`.
#[cfg(target_os = "linux")]
pub fn wake(word: &AtomicU32) {
    let _ =
        rustix::thread::futex::wake(word, rustix::thread::futex::Flags::empty(), i32::MAX.cast_unsigned());
}

/// Without futexes: naps.
#[cfg(not(target_os = "linux"))]
pub fn sleep_while(word: &AtomicU32, seen: u32, at_most: Duration) {
    if word.load(Ordering::Acquire) == seen {
        std::thread::sleep(at_most.min(Duration::from_micros(50)));
    }
}

#[cfg(not(target_os = "linux"))]
pub fn wake(_: &AtomicU32) {}

/// Rounds of looking before sleeping: first busily, then giving the core away (ranks may outnumber cores).
const SPINS: u32 = 200;
const YIELDS: u32 = 20;

/// One round of waiting: round `n` of a wait for `word` to change from `seen`.
pub fn pause(round: u32, word: &AtomicU32, sleepers: &AtomicU32, seen: u32, at_most: Duration) {
    if round < SPINS {
        std::hint::spin_loop();
    } else if round < SPINS + YIELDS {
        std::thread::yield_now();
    } else {
        // Sequentially consistent with the publisher's store and its look at the sleepers: one of the two sees the other.
        sleepers.fetch_add(1, Ordering::SeqCst);
        if word.load(Ordering::SeqCst) == seen {
            sleep_while(word, seen, at_most);
        }
        sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Publishes `value` in `word` and wakes those who sleep on it.
pub fn publish(word: &AtomicU32, sleepers: &AtomicU32, value: u32) {
    word.store(value, Ordering::SeqCst);
    if sleepers.load(Ordering::SeqCst) != 0 {
        wake(word);
    }
}

/// Whether a wait in this round is about to sleep: time for the expensive checks.
pub fn is_slow(round: u32) -> bool {
    round >= SPINS + YIELDS
}
