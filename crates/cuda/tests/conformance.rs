//! Every group of PTX wrappers (`cuda/ptx`) against plain arithmetic: on the emulator, and on a GPU where the instructions
//! exist. Inputs are small integers where sums are formed, so that every result is exact whatever the order.

mod common;

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use common::{Random, context, schedules};
use half::{bf16, f16};
use longhaul_cuda::conformance::{ClusterParams, Params, TensorParams, kernel};
use longhaul_cuda::driver::{DevicePtr, Driver, Element, Geometry, Memory, Swizzle, TensorMapSpec};
use longhaul_cuda::{Context, Kernel, Variant};

/// Whether the device has the instructions of `least`, which is 80 or 90. Those of 9.0 are compiled for sm_90a alone: PTX for
/// later devices is of compute_89.
fn has(ctx: &Context, least: u32) -> bool {
    let found = ctx.driver.properties().compute_capability;
    if least == 90 { found == 90 } else { found >= least }
}

/// Calls `run` on a device under every schedule, if it has the instructions of `compute_capability`.
fn on_devices(compute_capability: u32, run: impl Fn(&Context)) {
    for options in schedules() {
        let ctx = context(options, Variant::Plain, Element::F32);
        if has(&ctx, compute_capability) {
            run(&ctx);
        }
    }
}

fn put<T: Pod>(driver: &Arc<dyn Driver>, values: &[T]) -> Memory {
    Memory::from_bytes(driver, bytemuck::cast_slice(values), "input").unwrap()
}

fn room<T: Pod>(driver: &Arc<dyn Driver>, count: usize) -> Memory {
    let memory = Memory::new(driver, count * size_of::<T>(), "output").unwrap();
    driver.fill(memory.address(), 0xff, memory.bytes()).unwrap();
    memory
}

fn read<T: Pod>(driver: &Arc<dyn Driver>, memory: &Memory, count: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); count];
    driver.download(memory.address(), bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

/// Launches one block of `threads` and returns `count` values of its output.
fn run_one<A: Pod, T: Pod>(
    ctx: &Context,
    kernel: &Kernel<Params>,
    threads: u32,
    a: &[A],
    (mode, amount): (u32, u32),
    count: usize,
) -> Vec<T> {
    let (input, out) = (put(&ctx.driver, a), room::<T>(&ctx.driver, count));
    let params = Params { a: input.address(), b: DevicePtr::NULL, out: out.address(), mode, count: amount };
    ctx.launch(kernel, Geometry::linear(1, threads), params).unwrap();
    read(&ctx.driver, &out, count)
}

/// Integers from -3 to 3.
fn integers(count: usize, seed: u64) -> Vec<i32> {
    let mut random = Random(seed);
    (0..count).map(|_| random.below(7) as i32 - 3).collect()
}

/// How a matrix of small integers is stored.
#[derive(Clone, Copy, PartialEq)]
enum Number {
    Bf16,
    F16,
    E4m3,
}

impl Number {
    fn bytes(self) -> usize {
        if self == Number::E4m3 { 1 } else { 2 }
    }

    fn encode(self, values: &[i32]) -> Vec<u8> {
        let one = |&v: &i32| match self {
            Number::Bf16 => bf16::from_f32(v as f32).to_le_bytes().to_vec(),
            Number::F16 => f16::from_f32(v as f32).to_le_bytes().to_vec(),
            Number::E4m3 => {
                let magnitude = [0x00, 0x38, 0x40, 0x44][v.unsigned_abs() as usize];
                vec![if v < 0 { magnitude | 0x80 } else { magnitude }]
            }
        };
        values.iter().flat_map(one).collect()
    }
}

/// `a[rows, depth] · b[columns, depth]ᵀ`.
fn product(a: &[i32], b: &[i32], depth: usize) -> Vec<f32> {
    a.chunks_exact(depth).flat_map(|row| b.chunks_exact(depth).map(|column| dot(row, column))).collect()
}

fn dot(a: &[i32], b: &[i32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum::<i32>() as f32
}

#[test]
fn mma_multiplies() {
    for (mode, number, least) in [(0, Number::Bf16, 80), (1, Number::F16, 80), (2, Number::E4m3, 89)] {
        on_devices(least, |ctx| {
            let depth = 32 / number.bytes();
            let (a, b) = (integers(16 * depth, 1), integers(8 * depth, 2));
            let (da, db) = (put(&ctx.driver, &number.encode(&a)), put(&ctx.driver, &number.encode(&b)));
            let out = room::<f32>(&ctx.driver, 128);
            let params = Params { a: da.address(), b: db.address(), out: out.address(), mode, count: 0 };
            ctx.launch(&kernel::MMA, Geometry::linear(1, 32), params).unwrap();
            assert_eq!(read::<f32>(&ctx.driver, &out, 128), product(&a, &b, depth), "mode {mode}");
        });
    }
}

/// The pair of elements of 8x8 matrix `m` that lane `lane` holds.
fn fragment(elements: &[u16], m: usize, lane: usize, transposed: bool) -> u32 {
    let (row, column) = (lane / 4, lane % 4 * 2);
    let at =
        |i: usize, j: usize| u32::from(elements[m * 64 + if transposed { j * 8 + i } else { i * 8 + j }]);
    at(row, column) | at(row, column + 1) << 16
}

#[test]
fn ldmatrix_hands_out_rows_and_columns() {
    on_devices(80, |ctx| {
        let elements: Vec<u16> = (0..256).map(|i| i * 251).collect();
        let got: Vec<u32> = run_one(ctx, &kernel::LDMATRIX, 32, &elements, (0, 0), 32 * 13);
        for (lane, registers) in got.chunks_exact(13).enumerate() {
            let of = |m, transposed| fragment(&elements, m, lane, transposed);
            let expected: Vec<u32> = (0..4)
                .map(|m| of(m, false))
                .chain((0..4).map(|m| of(m, true)))
                .chain([of(0, false), of(0, false), of(1, false), of(0, true), of(1, true)])
                .collect();
            assert_eq!(registers, expected, "lane {lane}");
        }
    });
}

#[test]
fn stmatrix_places_rows_and_columns() {
    on_devices(90, |ctx| {
        let mut random = Random(5);
        let registers: Vec<u32> = (0..128).map(|_| random.next_u64() as u32).collect();
        let got: Vec<u16> = run_one(ctx, &kernel::STMATRIX, 32, &registers, (0, 0), 512);
        for (lane, held) in registers.chunks_exact(4).enumerate() {
            for (m, &register) in held.iter().enumerate() {
                assert_eq!(fragment(&got[..256], m, lane, false), register);
                assert_eq!(fragment(&got[256..], m, lane, true), register);
            }
        }
    });
}

#[test]
fn cp_async_copies_and_fills() {
    on_devices(80, |ctx| {
        let words: Vec<u32> = (0..416).map(|i| 0x0101_0101u32.wrapping_mul(i)).collect();
        for source_bytes in [0, 4, 8, 12, 16] {
            let got: Vec<u32> = run_one(ctx, &kernel::CP_ASYNC, 32, &words, (0, source_bytes), 480);
            assert_eq!(got[..352], words[..352]);
            for (i, &word) in got[352..].iter().enumerate() {
                let copied = (i % 4 * 4) < source_bytes as usize;
                assert_eq!(
                    word,
                    if copied { words[352 + i % 64] } else { 0 },
                    "{source_bytes} bytes, word {i}"
                );
            }
        }
    });
}

#[test]
fn bulk_copies_go_through_a_ring_and_back() {
    on_devices(90, |ctx| {
        for tiles in [1, 2, 7] {
            let words: Vec<u32> = (0..tiles * 64).map(|i| i * 7 + 1).collect();
            let (a, phase) = (put(&ctx.driver, &words), room::<u32>(&ctx.driver, 1));
            let out = room::<u32>(&ctx.driver, words.len());
            let params =
                Params { a: a.address(), b: phase.address(), out: out.address(), mode: 0, count: tiles };
            ctx.launch(&kernel::BULK_COPY, Geometry::linear(1, 96), params).unwrap();
            let expected: Vec<u32> = words.iter().map(|w| w + 1).collect();
            assert_eq!(read::<u32>(&ctx.driver, &out, words.len()), expected);
            assert_eq!(read::<u32>(&ctx.driver, &phase, 1), [1], "parity of a fresh barrier");
        }
    });
}

/// A tensor of `dims` with `padding` bytes behind each row, and boxes of it.
struct BoxCase {
    element: Element,
    dims: &'static [u64],
    padding: u64,
    box_dims: &'static [u32],
    swizzle: Swizzle,
    at: &'static [i32],
}

impl BoxCase {
    fn strides(&self) -> Vec<u64> {
        let mut stride = self.dims[0] * self.element.size() as u64 + self.padding;
        let mut strides = Vec::new();
        for &d in &self.dims[1..] {
            strides.push(stride);
            stride *= d;
        }
        strides
    }

    fn tensor_bytes(&self) -> usize {
        (self.strides().last().unwrap() * self.dims.last().unwrap()) as usize
    }

    fn box_bytes(&self) -> usize {
        self.box_dims.iter().map(|&d| d as usize).product::<usize>() * self.element.size()
    }

    /// For each byte of the box in shared memory, the byte of the tensor that belongs there, if it is inside.
    fn source_of(&self, shared_byte: usize) -> Option<usize> {
        let span = self.swizzle.span() as usize;
        let swapped = if span == 0 { 0 } else { (shared_byte / 128 * 16) & (span - 16) };
        let logical = shared_byte ^ swapped;
        let size = self.element.size();
        let (mut rest, mut byte) = (logical / size, logical % size);
        let strides: Vec<u64> = [size as u64].into_iter().chain(self.strides()).collect();
        for (d, &extent) in self.box_dims.iter().enumerate() {
            let index = i64::from(self.at[d]) + (rest % extent as usize) as i64;
            rest /= extent as usize;
            if index < 0 || index >= self.dims[d] as i64 {
                return None;
            }
            byte += index as usize * strides[d] as usize;
        }
        Some(byte)
    }

    fn params(&self, ctx: &Context, tensor: &Memory, raw: &Memory, mode: u32) -> TensorParams {
        let map = ctx
            .driver
            .tensor_map(&TensorMapSpec {
                address: tensor.address(),
                element: self.element,
                dims: self.dims,
                strides: &self.strides(),
                box_dims: self.box_dims,
                swizzle: self.swizzle,
            })
            .unwrap();
        let mut at = [0; 5];
        at[..self.at.len()].copy_from_slice(self.at);
        let (rank, bytes) = (self.dims.len() as u32, self.box_bytes() as u32);
        TensorParams { map, raw: raw.address(), at, rank, bytes, mode, ..TensorParams::zeroed() }
    }
}

const BOXES: [BoxCase; 9] = [
    BoxCase {
        element: Element::Bf16,
        dims: &[64, 20],
        padding: 0,
        box_dims: &[64, 16],
        swizzle: Swizzle::Bytes128,
        at: &[0, 2],
    },
    BoxCase {
        element: Element::Bf16,
        dims: &[100, 20],
        padding: 8,
        box_dims: &[32, 16],
        swizzle: Swizzle::Bytes64,
        at: &[80, -3],
    },
    BoxCase {
        element: Element::Bf16,
        dims: &[64, 20],
        padding: 32,
        box_dims: &[16, 24],
        swizzle: Swizzle::Bytes32,
        at: &[-8, 10],
    },
    BoxCase {
        element: Element::U32,
        dims: &[32, 9],
        padding: 0,
        box_dims: &[32, 9],
        swizzle: Swizzle::Bytes128,
        at: &[0, 0],
    },
    BoxCase {
        element: Element::E4m3,
        dims: &[128, 9],
        padding: 16,
        box_dims: &[128, 8],
        swizzle: Swizzle::Bytes128,
        at: &[64, 4],
    },
    BoxCase {
        element: Element::F32,
        dims: &[12, 5],
        padding: 0,
        box_dims: &[4, 3],
        swizzle: Swizzle::None,
        at: &[10, 4],
    },
    BoxCase {
        element: Element::Bf16,
        dims: &[64, 3, 10],
        padding: 0,
        box_dims: &[64, 1, 8],
        swizzle: Swizzle::Bytes128,
        at: &[0, 2, 5],
    },
    BoxCase {
        element: Element::Bf16,
        dims: &[64, 2, 8, 5],
        padding: 0,
        box_dims: &[64, 1, 8, 2],
        swizzle: Swizzle::Bytes128,
        at: &[0, 1, 0, 4],
    },
    BoxCase {
        element: Element::Bf16,
        dims: &[16, 3, 2, 3, 2],
        padding: 0,
        box_dims: &[8, 2, 2, 2, 2],
        swizzle: Swizzle::None,
        at: &[12, -1, 1, 1, 1],
    },
];

#[test]
fn boxes_land_swizzled_with_zeros_outside() {
    on_devices(90, |ctx| {
        for (i, case) in BOXES.iter().enumerate() {
            let bytes: Vec<u8> = (0..case.tensor_bytes()).map(|b| (b * 37 + b / 251) as u8).collect();
            let tensor = put(&ctx.driver, &bytes);
            let raw = room::<u8>(&ctx.driver, case.box_bytes());
            for mode in [0, 1] {
                let params = case.params(ctx, &tensor, &raw, mode);
                let geometry = Geometry::linear(1, 128).shared(case.box_bytes());
                ctx.launch(&kernel::TENSOR_LOAD, geometry, params).unwrap();
                let expected: Vec<u8> = (0..case.box_bytes())
                    .map(|byte| case.source_of(byte).map_or(0, |from| bytes[from]))
                    .collect();
                assert_eq!(read::<u8>(&ctx.driver, &raw, expected.len()), expected, "box {i}");
            }
        }
    });
}

#[test]
fn stored_boxes_leave_out_what_is_outside() {
    on_devices(90, |ctx| {
        for (i, case) in BOXES.iter().enumerate() {
            let before: Vec<u8> = (0..case.tensor_bytes()).map(|b| (b * 11) as u8).collect();
            let content: Vec<u8> = (0..case.box_bytes()).map(|b| (b * 37 + b / 251) as u8).collect();
            let (tensor, raw) = (put(&ctx.driver, &before), put(&ctx.driver, &content));
            let params = case.params(ctx, &tensor, &raw, 0);
            let geometry = Geometry::linear(1, 128).shared(case.box_bytes());
            ctx.launch(&kernel::TENSOR_STORE, geometry, params).unwrap();
            let mut expected = before;
            for (byte, &value) in content.iter().enumerate() {
                if let Some(to) = case.source_of(byte) {
                    expected[to] = value;
                }
            }
            assert_eq!(read::<u8>(&ctx.driver, &tensor, expected.len()), expected, "box {i}");
        }
    });
}

const A_MN_MAJOR: u32 = 4;
const B_MN_MAJOR: u32 = 8;
const A_REGISTERS: u32 = 16;
/// Widths of a row-major operand's lines in 16-bit elements, by the descriptor's swizzle.
const LINE: [usize; 4] = [8, 64, 32, 16];

fn wgmma(ctx: &Context, kernel: &Kernel<Params>, n: usize, number: Number, modes: &[u32]) {
    let depth = 128 / number.bytes();
    let (a, b) = (integers(64 * depth, n as u64), integers(n * depth, 7));
    let (da, db) = (put(&ctx.driver, &number.encode(&a)), put(&ctx.driver, &number.encode(&b)));
    let expected = product(&a, &b, depth);
    for &mode in modes {
        if mode & B_MN_MAJOR != 0 && !n.is_multiple_of(LINE[mode as usize & 3]) {
            continue;
        }
        let out = room::<f32>(&ctx.driver, 64 * n);
        let params = Params { a: da.address(), b: db.address(), out: out.address(), mode, count: 0 };
        let geometry = Geometry::linear(1, 128).shared((64 + n) * 128);
        ctx.launch(kernel, geometry, params).unwrap();
        let got = read::<f32>(&ctx.driver, &out, 64 * n);
        let wrong = got.iter().zip(&expected).filter(|(g, e)| g != e).count();
        assert_eq!(wrong, 0, "{} in mode {mode:#x}: {wrong} of {} elements", kernel.name(), got.len());
    }
}

/// Layouts of both operands in shared memory, and of B with A in registers.
fn wgmma_modes() -> Vec<u32> {
    let majors = [0, A_MN_MAJOR, B_MN_MAJOR, A_MN_MAJOR | B_MN_MAJOR, A_REGISTERS, A_REGISTERS | B_MN_MAJOR];
    (0..4).flat_map(|swizzle| majors.map(|major| swizzle | major)).collect()
}

#[test]
fn wgmma_multiplies_every_shape_and_layout() {
    // Late and early copies; other seeds and resident blocks change nothing for one block.
    for options in schedules().into_iter().step_by(3) {
        let ctx = context(options, Variant::Plain, Element::F32);
        if has(&ctx, 90) {
            for (n, kernel) in &kernel::WGMMA_BF16 {
                wgmma(&ctx, kernel, *n, Number::Bf16, &wgmma_modes());
            }
        }
    }
}

#[test]
fn wgmma_multiplies_other_elements() {
    on_devices(90, |ctx| {
        wgmma(ctx, &kernel::WGMMA_F16, 64, Number::F16, &wgmma_modes());
        // e4m3 is depth-major only.
        let modes: Vec<u32> = (0..4).flat_map(|swizzle| [swizzle, swizzle | A_REGISTERS]).collect();
        wgmma(ctx, &kernel::WGMMA_E4M3, 64, Number::E4m3, &modes);
    });
}

/// The value of an e4m3 code (OCP FP8: bias 7, no infinities).
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa * 2f64.powi(-9),
        _ => (8.0 + mantissa) * 2f64.powi(exponent - 10),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// The nearest e4m3 by search: ties to the even code, saturated.
fn nearest_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = f64::from(value.abs());
    let distance = |code: u8| (e4m3(code) - magnitude).abs();
    let best = (0..0x7f).min_by(|&x, &y| distance(x).total_cmp(&distance(y)).then((x % 2).cmp(&(y % 2))));
    best.unwrap() | sign
}

#[test]
fn conversions_round_to_the_nearest_even() {
    let mut values: Vec<f32> =
        vec![0.0, -0.0, 1.0, -2.0, 448.0, -449.0, 1e9, 65504.0, 65520.0, 1e-3, 2f32.powi(-10), -3.3];
    for code in 0..0x7e {
        let middle = ((e4m3(code) + e4m3(code + 1)) / 2.0) as f32;
        values.extend([middle, -middle, middle.next_up(), middle.next_down()]);
    }
    let mut random = Random(3);
    values.extend((0..400).map(|_| random.value() * 2f32.powi(random.below(40) as i32 - 24)));
    on_devices(80, |ctx| {
        let count = values.len() / 2;
        let got: Vec<[u32; 4]> = run_one(ctx, &kernel::CONVERT, 128, &values, (0, count as u32), count);
        let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        let f16_of = |code: u8| f16::from_f64(e4m3(code)).to_bits();
        for (out, pairs) in got.iter().zip(values.chunks_exact(2)) {
            let [low, high] = [pairs[0], pairs[1]];
            assert_eq!(
                out[0],
                pair(bf16::from_f32(low).to_bits(), bf16::from_f32(high).to_bits()),
                "{low} {high}"
            );
            assert_eq!(
                out[1],
                pair(f16::from_f32(low).to_bits(), f16::from_f32(high).to_bits()),
                "{low} {high}"
            );
            if ctx.driver.properties().compute_capability >= 89 {
                let codes = [nearest_e4m3(low), nearest_e4m3(high)];
                assert_eq!(out[2], u32::from(codes[0]) | u32::from(codes[1]) << 8, "{low} {high}");
                assert_eq!(out[3], pair(f16_of(codes[0]), f16_of(codes[1])), "{low} {high}");
            }
        }
    });
}

#[test]
fn shuffles_exchange_lanes() {
    on_devices(80, |ctx| {
        let values: Vec<u32> = (0..32).map(|i| i * 1000 + 5).collect();
        for by in [0u32, 1, 3, 16, 31] {
            let got: Vec<u32> = run_one(ctx, &kernel::SHUFFLE, 32, &values, (0, by), 128);
            for lane in 0..32u32 {
                let up = lane.checked_sub(by).unwrap_or(lane);
                let down = if lane + by < 32 { lane + by } else { lane };
                let from = [(lane * by) % 32, up, down, lane ^ by];
                let expected = from.map(|source| values[source as usize]);
                assert_eq!(got[lane as usize * 4..][..4], expected, "lane {lane} by {by}");
            }
        }
    });
}

#[test]
fn hinted_accesses_move_the_bytes() {
    on_devices(80, |ctx| {
        let words: Vec<u32> = (0..512).map(|i| i * 77 + 3).collect();
        let got: Vec<u32> = run_one(ctx, &kernel::HINTS, 128, &words, (0, 0), 6 * 512 + 128);
        for copy in got[..6 * 512].chunks_exact(512) {
            assert_eq!(copy, words);
        }
        assert_eq!(got[6 * 512..], words[..128]);
    });
}

#[test]
fn atomics_and_ordered_accesses_agree_between_blocks() {
    on_devices(80, |ctx| {
        let blocks = 6u32;
        let (partial, out) = (room::<u32>(&ctx.driver, blocks as usize), put(&ctx.driver, &[0u32; 9]));
        let geometry = Geometry { cooperative: true, ..Geometry::linear(blocks as usize, 32) };
        let params =
            Params { a: DevicePtr::NULL, b: partial.address(), out: out.address(), mode: 0, count: 0 };
        ctx.launch(&kernel::ATOMICS, geometry, params).unwrap();
        let got = read::<u32>(&ctx.driver, &out, 9);
        let below: u32 = (0..blocks).sum();
        assert_eq!(got[0], blocks, "tickets");
        assert_eq!(got[1] + got[4], below + blocks, "exchanged values");
        assert_eq!(got[2..4], [below, below + blocks], "reductions");
        assert_eq!(got[5], 3 * blocks, "compare and swap");
        assert_eq!(got[6], below + blocks, "the last block's sum");
        assert_eq!(got[7..], [blocks, below], "the token");
    });
}

#[test]
fn launch_control_and_register_budgets_change_no_result() {
    on_devices(80, |ctx| {
        let count = 300;
        let first = put(&ctx.driver, &(0..count).collect::<Vec<u32>>());
        let second = room::<u32>(&ctx.driver, count as usize);
        for (from, to) in [(&first, &second), (&second, &first), (&first, &second)] {
            let params = Params { a: from.address(), b: DevicePtr::NULL, out: to.address(), mode: 0, count };
            ctx.launch(&kernel::GRIDDEPCONTROL, Geometry::linear(3, 128), params).unwrap();
        }
        let expected: Vec<u32> = (3..count + 3).collect();
        assert_eq!(read::<u32>(&ctx.driver, &second, count as usize), expected);
    });
    on_devices(90, |ctx| {
        let words: Vec<u32> = (0..384).collect();
        let got: Vec<u32> = run_one(ctx, &kernel::SETMAXNREG, 384, &words, (0, 0), 384);
        let expected: Vec<u32> = words.iter().map(|w| w * (1 + w / 128)).collect();
        assert_eq!(got, expected);
    });
}

#[test]
fn clusters_share_memory_and_copies() {
    on_devices(90, |ctx| {
        let rows: Vec<u32> = (0..128).map(|i| i * 3 + 1).collect();
        let (tensor, out) = (put(&ctx.driver, &rows), room::<u32>(&ctx.driver, 8 * 256));
        let spec = TensorMapSpec {
            address: tensor.address(),
            element: Element::U32,
            dims: &[64, 2],
            strides: &[256],
            box_dims: &[64, 1],
            swizzle: Swizzle::None,
        };
        let map = ctx.driver.tensor_map(&spec).unwrap();
        let params = ClusterParams { map, out: out.address(), ..ClusterParams::zeroed() };
        ctx.launch(&kernel::CLUSTER, Geometry::linear(8, 64).shared(256), params).unwrap();
        let got = read::<u32>(&ctx.driver, &out, 8 * 256);
        for (block, words) in got.chunks_exact(256).enumerate() {
            let (rank, first) = (block as u32 % 4, block as u32 / 4 * 4);
            let (left, right) = (first + (rank + 3) % 4, first + (rank + 1) % 4);
            for t in 0..64 {
                assert_eq!(words[t as usize], if t == 0 { rank } else { 4 });
                assert_eq!(words[64 + t as usize], right * 1000 + t, "the right neighbour's memory");
                // The left neighbour stored 32 words of this block's, and 32 of its own making.
                let stored = if t < 32 { block as u32 * 1000 + t } else { left % 4 * 100 + t };
                assert_eq!(words[128 + t as usize], stored, "what the left neighbour stored");
                assert_eq!(words[192 + t as usize], rows[64 + t as usize], "the row for all");
            }
        }
    });
}

/// On the emulator what nobody wrote is a NaN in every format, so that it cannot pass for a result.
#[test]
fn an_unwritten_output_is_nan_on_the_emulator() {
    on_devices(80, |ctx| {
        if ctx.driver.properties().name != "emulated" {
            return;
        }
        let (input, out) = (put(&ctx.driver, &[1u32; 128]), Memory::new(&ctx.driver, 512, "output").unwrap());
        let params =
            Params { a: input.address(), b: DevicePtr::NULL, out: out.address(), mode: 0, count: 127 };
        ctx.launch(&kernel::GRIDDEPCONTROL, Geometry::linear(1, 128), params).unwrap();
        let got = read::<f32>(&ctx.driver, &out, 128);
        assert!(got[127].is_nan());
        assert!(got[..127].iter().all(|v| v.to_bits() == 2));
    });
}
