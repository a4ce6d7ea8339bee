//! What the kernel tests share: the device under test, random values, comparison with a float64 reference.
//!
//! The device is emulated, under several schedules, unless two variables choose otherwise (they need feature `cuda`):
//! `LONGHAUL_TEST_DEVICE=cuda` the first GPU, for which tests run one after the other (`--test-threads 1`: it has one stream),
//! and `LONGHAUL_TEST_KERNELS=plain` or `mma` the kernels that run where a test leaves the choice open.
#![allow(dead_code)] // every test program uses a part

use std::sync::Arc;

use longhaul_cuda::arena::Arena;
use longhaul_cuda::driver::{Driver, Element, Emulated, EmulatedOptions};
use longhaul_cuda::{Context, Variant};

/// Whether the tests run on a GPU.
pub fn on_gpu() -> bool {
    match std::env::var("LONGHAUL_TEST_DEVICE").as_deref() {
        Err(_) | Ok("emulated") => false,
        Ok("cuda") => true,
        Ok(other) => panic!("LONGHAUL_TEST_DEVICE={other}: neither emulated nor cuda"),
    }
}

/// The device under test; `options` are those of the emulated one.
pub fn driver(options: EmulatedOptions) -> Arc<dyn Driver> {
    if on_gpu() { gpu() } else { Arc::new(Emulated::new(options).expect("this build has the emulator")) }
}

/// The first GPU, opened once for all tests of the program.
#[cfg(feature = "cuda")]
fn gpu() -> Arc<dyn Driver> {
    static GPU: std::sync::OnceLock<Arc<longhaul_cuda::driver::Gpu>> = std::sync::OnceLock::new();
    GPU.get_or_init(|| Arc::new(longhaul_cuda::driver::Gpu::open(0).unwrap_or_else(|e| panic!("{e}"))))
        .clone()
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Arc<dyn Driver> {
    panic!("LONGHAUL_TEST_DEVICE=cuda: this test was built without feature cuda")
}

/// Says why a test does not apply to a GPU and returns true there: the test ends.
pub fn skip_on_gpu(reason: &str) -> bool {
    if on_gpu() {
        eprintln!("skipped on a GPU: {reason}");
    }
    on_gpu()
}

/// Schedules of the emulator under which a kernel must give the same result: eager and lazy copies, three seeds, one and
/// several blocks in flight. A GPU has its own: one entry.
pub fn schedules() -> Vec<EmulatedOptions> {
    if on_gpu() {
        return vec![EmulatedOptions::default()];
    }
    let mut all = Vec::new();
    for eager in [false, true] {
        for (seed, resident_blocks) in [(1, 1), (2, 2), (3, 4)] {
            all.push(EmulatedOptions { eager, seed, resident_blocks, ..EmulatedOptions::default() });
        }
    }
    all
}

/// The kernels of a test that leaves the choice open.
pub fn open_choice() -> Variant {
    match std::env::var("LONGHAUL_TEST_KERNELS").as_deref() {
        Err(_) | Ok("auto") => Variant::Auto,
        Ok("plain") => Variant::Plain,
        Ok("mma") => Variant::Mma,
        Ok(other) => panic!("LONGHAUL_TEST_KERNELS={other}: none of auto, plain, mma"),
    }
}

/// A context on the device under test with a 64 MiB arena.
pub fn context(options: EmulatedOptions, variant: Variant, element: Element) -> Context {
    let driver = driver(options);
    let arena = Arena::new(&driver, 64 << 20).expect("arena");
    let variant = if variant == Variant::Auto { open_choice() } else { variant };
    Context::new(driver, arena, variant, element).expect("context")
}

/// Deterministic values in `[-1, 1)` (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next_u64() % bound as u64) as usize
    }

    pub fn value(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    /// Values that `element` holds exactly, so that a reference sees the same numbers as the kernel.
    pub fn exact(&mut self, count: usize, element: Element) -> Vec<f32> {
        self.values(count).into_iter().map(|v| round(v, element)).collect()
    }
}

/// `value` rounded to `element`.
pub fn round(value: f32, element: Element) -> f32 {
    match element {
        Element::Bf16 => half::bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Largest error of `got` relative to the largest magnitude of `exact`; panics on a NaN, an infinity or a wrong count.
#[track_caller]
pub fn relative_error(got: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(got.len(), exact.len());
    let scale = exact.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    let mut worst = 0f64;
    for (i, (g, e)) in got.iter().zip(exact).enumerate() {
        assert!(g.is_finite(), "element {i} is {g}, expected {e}");
        worst = worst.max((f64::from(*g) - e).abs());
    }
    worst / scale
}

/// Tolerance for results stored as `element` from f32 arithmetic.
pub fn tolerance(element: Element) -> f64 {
    match element {
        Element::Bf16 => 5e-3, // half a unit in the last place of bf16 is 2^-9
        _ => 2e-6,
    }
}
