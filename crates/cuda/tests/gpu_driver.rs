//! The GPU driver's bookkeeping, over a fake libcuda that runs queued work as late as it may and kernels on the emulator.

#[path = "../../../tests/fake_cuda/emulator.rs"]
mod emulator;

mod common;

use common::{Random, round};
use emulator::Fake;
use longhaul_cuda::CudaError;
use longhaul_cuda::driver::{DevicePtr, Driver, Element, Gemm, Geometry, Gpu};
use longhaul_testkit::with_fake_cuda;

const FOLDER: &str = env!("CARGO_TARGET_TMPDIR");

fn on_fake(name: &str, extra: &[(&str, &str)], body: impl FnOnce(&Fake, &Gpu)) {
    with_fake_cuda(FOLDER, name, extra, || {
        let fake = Fake::with_emulator();
        let gpu = Gpu::open(0).unwrap();
        body(&fake, &gpu);
        drop(gpu);
        assert_eq!(fake.live(), 0, "everything was given back");
    });
}

fn download(gpu: &Gpu, from: DevicePtr, bytes: usize) -> Vec<u8> {
    let mut out = vec![0u8; bytes];
    gpu.download(from, &mut out).unwrap();
    out
}

/// Sources are overwritten at once, copies run late, and more is uploaded than the ring holds.
#[test]
fn the_source_of_an_upload_is_free_at_once() {
    on_fake("the_source_of_an_upload_is_free_at_once", &[], |fake, gpu| {
        const BYTES: usize = (3 << 20) + 7;
        const COUNT: usize = 20;
        let memory = gpu.allocate(BYTES * COUNT, "test").unwrap();
        let mut source = vec![0u8; BYTES];
        for index in 0..COUNT {
            source.fill(index as u8 + 1);
            gpu.upload(memory.offset(index * BYTES), &source).unwrap();
            source.fill(0xee);
        }
        assert!(fake.pending() > 0, "uploads do not wait");
        let all = download(gpu, memory, BYTES * COUNT);
        for (index, part) in all.chunks(BYTES).enumerate() {
            assert!(part.iter().all(|&b| b == index as u8 + 1), "part {index}");
        }
        // One upload larger than the whole ring.
        let large: Vec<u8> = (0..50 << 20).map(|i: u32| (i / 4096 + i) as u8).collect();
        gpu.upload(memory, &large).unwrap();
        assert!(download(gpu, memory, large.len()) == large);
        gpu.upload(memory, &[]).unwrap();
        gpu.free(memory);
    });
}

#[test]
fn a_recording_runs_when_it_is_replayed() {
    on_fake("a_recording_runs_when_it_is_replayed", &[], |_, gpu| {
        let (a, b) = (gpu.allocate(64, "a").unwrap(), gpu.allocate(64, "b").unwrap());
        gpu.fill(a, 1, 64).unwrap();
        gpu.fill(b, 2, 64).unwrap();
        assert!(gpu.end_recording().is_err(), "nothing is being recorded");
        gpu.begin_recording().unwrap();
        gpu.fill(a, 7, 32).unwrap();
        gpu.copy(b, a, 64).unwrap();
        for refused in [
            gpu.upload(a, &[0; 8]),
            gpu.download(a, &mut [0; 8]),
            gpu.synchronise(),
            gpu.begin_recording(),
            gpu.time(&mut || Ok(())).map(|_| ()),
        ] {
            assert!(matches!(refused, Err(CudaError::Call { .. })), "{refused:?}");
        }
        let graph = gpu.end_recording().unwrap();
        assert_eq!(download(gpu, b, 64), [2; 64], "recording runs nothing");
        for _ in 0..2 {
            gpu.fill(b, 0, 64).unwrap();
            gpu.replay(graph).unwrap();
            let bytes = download(gpu, b, 64);
            assert_eq!((&bytes[..32], &bytes[32..]), (&[7; 32][..], &[1; 32][..]));
        }
        assert!(gpu.replay(longhaul_cuda::driver::GraphId(9)).is_err());
        gpu.free(a);
        gpu.free(b);
    });
}

#[test]
fn a_spoilt_recording_leaves_the_stream_usable() {
    on_fake("a_spoilt_recording_leaves_the_stream_usable", &[], |fake, gpu| {
        let memory = gpu.allocate(64, "test").unwrap();
        let dropped = gpu.allocate(64, "dropped").unwrap();
        gpu.begin_recording().unwrap();
        gpu.fill(memory, 9, 64).unwrap();
        // Memory that its owner drops while recording must not spoil the recording.
        gpu.free(dropped);
        let graph = gpu.end_recording().unwrap();
        gpu.begin_recording().unwrap();
        assert_ne!(fake.wait_unasked(), 0);
        let error = gpu.end_recording().unwrap_err();
        assert!(matches!(error, CudaError::Call { .. }), "{error:?}");
        gpu.fill(memory, 1, 64).unwrap();
        assert_eq!(download(gpu, memory, 64), [1; 64]);
        gpu.replay(graph).unwrap();
        assert_eq!(download(gpu, memory, 64), [9; 64]);
        gpu.free(memory);
    });
}

/// Every combination of elements, with and without bias, strides larger than rows, addresses aligned to 16 bytes only.
#[test]
fn products_match_float64() {
    on_fake("products_match_float64", &[], |_, gpu| {
        let mut random = Random(11);
        let (m, n, k) = (70, 33, 40);
        let (x_stride, weight_stride, out_stride) = (48, 40, 40);
        for (element, out_element) in
            [(Element::Bf16, Element::Bf16), (Element::Bf16, Element::F32), (Element::F32, Element::F32)]
        {
            let x = random.exact(m * x_stride, element);
            let weight = random.exact(n * weight_stride, element);
            let bias = random.values(n);
            let put = |values: &[f32], element: Element| {
                let bytes: Vec<u8> = values
                    .iter()
                    .flat_map(|&v| match element {
                        Element::F32 => v.to_le_bytes().to_vec(),
                        _ => half::bf16::from_f32(v).to_le_bytes().to_vec(),
                    })
                    .collect();
                let memory = gpu.allocate(bytes.len() + 16, "operand").unwrap();
                gpu.upload(memory.offset(16), &bytes).unwrap();
                memory
            };
            let operands = [put(&x, element), put(&weight, element), put(&bias, Element::F32)];
            let out = gpu.allocate(m * out_stride * 4, "out").unwrap();
            for with_bias in [false, true] {
                gpu.fill(out, 0xff, m * out_stride * 4).unwrap();
                let gemm = Gemm {
                    x: operands[0].offset(16),
                    x_stride,
                    weight: operands[1].offset(16),
                    weight_stride,
                    bias: if with_bias { operands[2].offset(16) } else { DevicePtr::NULL },
                    out,
                    out_stride,
                    m,
                    n,
                    k,
                    element,
                    out_element,
                };
                // The second call takes the choice that the first one made.
                gpu.gemm(&gemm).unwrap();
                gpu.gemm(&gemm).unwrap();
                let bytes = download(gpu, out, m * out_stride * out_element.size());
                let got = |row: usize, col: usize| {
                    let at = (row * out_stride + col) * out_element.size();
                    match out_element {
                        Element::F32 => f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()),
                        _ => half::bf16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).to_f32(),
                    }
                };
                for row in 0..m {
                    for col in 0..n {
                        let mut exact: f64 = (0..k)
                            .map(|i| {
                                f64::from(x[row * x_stride + i]) * f64::from(weight[col * weight_stride + i])
                            })
                            .sum();
                        if with_bias {
                            exact += f64::from(round(bias[col], out_element));
                        }
                        let epsilon = if out_element == Element::F32 { 1e-6 } else { 4e-3 };
                        let error = (f64::from(got(row, col)) - exact).abs();
                        assert!(error <= epsilon * exact.abs().max(1.0), "{gemm:?} [{row}, {col}]");
                    }
                    // What lies between the columns and the stride is nobody's.
                    let gap = (row * out_stride + n) * out_element.size();
                    assert_eq!(bytes[gap], 0xff, "row {row}");
                }
            }
            operands.into_iter().chain([out]).for_each(|memory| gpu.free(memory));
        }
        let nothing = DevicePtr(256);
        let fp8 = Gemm {
            x: nothing,
            x_stride: 16,
            weight: nothing,
            weight_stride: 16,
            bias: DevicePtr::NULL,
            out: nothing,
            out_stride: 16,
            m: 1,
            n: 1,
            k: 16,
            element: Element::E4m3,
            out_element: Element::F32,
        };
        assert!(matches!(gpu.gemm(&fp8), Err(CudaError::Unsupported(_))));
    });
}

/// Two inputs, one output: params of `silu_and_mul_f32` as cuda/activation/silu_and_mul.cu has them do not matter here, only
/// their size does.
#[test]
fn a_launch_is_checked_before_it_is_made() {
    on_fake("a_launch_is_checked_before_it_is_made", &[], |_, gpu| {
        let error = gpu.launch("no_such_kernel", Geometry::linear(1, 32), &[]).unwrap_err().to_string();
        assert!(error.contains("no_such_kernel"), "{error}");
        let error = gpu.launch("silu_and_mul_f32", Geometry::linear(1, 32), &[0; 3]).unwrap_err().to_string();
        assert!(error.contains("silu_and_mul_f32") && error.contains("not 3"), "{error}");
        let kernel = longhaul_cuda::kernels().into_iter().find(|k| k.name == "silu_and_mul_f32").unwrap();
        let params = vec![0; kernel.params_bytes];
        let error = gpu.launch(kernel.name, Geometry::linear(0, 32), &params).unwrap_err();
        assert!(!error.is_fatal() && error.to_string().contains("grid: [0, 1, 1]"), "{error}");
    });
}

#[test]
fn time_is_between_two_events() {
    on_fake("time_is_between_two_events", &[], |_, gpu| {
        let memory = gpu.allocate(64, "test").unwrap();
        let milliseconds = gpu.time(&mut || (0..5).try_for_each(|i| gpu.fill(memory, i, 64))).unwrap();
        // The fake counts a millisecond an operation.
        assert_eq!(milliseconds, Some(5.0));
        gpu.free(memory);
    });
}

#[test]
fn memory_that_is_not_there_is_a_typed_error() {
    let memory = (1u64 << 30).to_string();
    on_fake("memory_that_is_not_there_is_a_typed_error", &[("FAKE_CUDA_MEMORY", &memory)], |_, gpu| {
        let free = gpu.free_bytes().unwrap();
        assert!(free < 1 << 30, "the workspace is taken");
        match gpu.allocate(2 << 30, "KV pool") {
            Err(CudaError::OutOfMemory { what, bytes, available }) => {
                assert_eq!((what.as_str(), bytes, available), ("KV pool", 2 << 30, free));
            }
            other => panic!("{other:?}"),
        }
    });
}

fn fault(gpu: &Gpu) -> CudaError {
    let kernel = longhaul_cuda::kernels().into_iter().find(|k| k.name == "silu_and_mul_f32").unwrap();
    let params = vec![0; kernel.params_bytes];
    let launched = gpu.launch(kernel.name, Geometry::linear(1, 256), &params);
    launched.and_then(|()| gpu.synchronise()).unwrap_err()
}

/// A fault shows late, names the last kernel, and stays.
#[test]
fn a_fault_ends_the_device() {
    on_fake("a_fault_ends_the_device", &[("FAKE_CUDA_FAULT", "silu_and_mul_f32")], |_, gpu| {
        let memory = gpu.allocate(64, "test").unwrap();
        let error = fault(gpu);
        assert!(error.is_fatal(), "{error:?}");
        let message = error.to_string();
        for part in ["silu_and_mul_f32", "CUDA_ERROR_ILLEGAL_ADDRESS (700)", "LONGHAUL_CUDA_SYNC", "restart"]
        {
            assert!(message.contains(part), "{message}");
        }
        assert!(gpu.upload(memory, &[1; 8]).unwrap_err().is_fatal());
        assert!(gpu.fill(memory, 0, 8).unwrap_err().is_fatal());
        assert!(gpu.download(memory, &mut [0; 8]).unwrap_err().is_fatal());
        assert!(gpu.allocate(8, "more").unwrap_err().is_fatal());
        gpu.free(memory);
    });
}

#[test]
fn a_fault_names_its_kernel_when_every_launch_is_waited_for() {
    let extra = [("FAKE_CUDA_FAULT", "silu_and_mul_f32"), ("LONGHAUL_CUDA_SYNC", "1")];
    on_fake("a_fault_names_its_kernel_when_every_launch_is_waited_for", &extra, |_, gpu| {
        let message = fault(gpu).to_string();
        assert!(message.starts_with("silu_and_mul_f32: CUDA_ERROR_ILLEGAL_ADDRESS"), "{message}");
    });
}

/// A driver may be used from a thread that has not opened it.
#[test]
fn any_thread_may_use_the_driver() {
    on_fake("any_thread_may_use_the_driver", &[], |_, gpu| {
        std::thread::scope(|scope| {
            for value in 1..4u8 {
                scope.spawn(move || {
                    let memory = gpu.allocate(1 << 20, "test").unwrap();
                    gpu.upload(memory, &vec![value; 1 << 20]).unwrap();
                    assert!(download(gpu, memory, 1 << 20).iter().all(|&b| b == value));
                    gpu.free(memory);
                });
            }
        });
    });
}
