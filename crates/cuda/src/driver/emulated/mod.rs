//! The emulated device: the kernels of `cuda/` compiled for the CPU, memory with red zones, launches under an adversarial
//! scheduler (`cuda/README.md`).

mod library;

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::Zeroable;
use half::bf16;

use self::library::{RawLaunch, RawTensor};
use super::{
    DeviceProperties, DevicePtr, Driver, Element, Gemm, Geometry, GraphId, HostWord, PeerHandle, TensorMap,
    TensorMapSpec,
};
use crate::{CudaError, Result};

/// How the emulator schedules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmulatedOptions {
    /// Asynchronous copies land at issue (true) or as late as a wait allows (false).
    pub eager: bool,
    /// Seed of the scheduler.
    pub seed: u64,
    /// Blocks in flight at once (all of the grid for cooperative launches).
    pub resident_blocks: u32,
    /// Compute capability to pretend, as 90 for 9.0.
    pub compute_capability: u32,
    /// Multiprocessors to pretend: how far kernels split their work.
    pub multiprocessors: u32,
}

impl Default for EmulatedOptions {
    fn default() -> Self {
        Self { eager: true, seed: 1, resident_blocks: 1, compute_capability: 90, multiprocessors: 8 }
    }
}

/// The emulated driver.
pub struct Emulated {
    options: EmulatedOptions,
    properties: DeviceProperties,
    recording: Mutex<Option<Vec<Work>>>,
    /// By number; `None` once it was dropped.
    graphs: Mutex<Vec<Option<Vec<Work>>>>,
}

/// One recorded operation.
#[derive(Debug, Clone)]
enum Work {
    Launch(CString, Geometry, Vec<u8>),
    Gemm(Gemm),
    Copy(DevicePtr, DevicePtr, usize),
    Fill(DevicePtr, u8, usize),
}

/// A kernel as the emulator knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmulatedKernel {
    /// Entry point.
    pub name: String,
    /// Size of its parameter block.
    pub params_bytes: u64,
    /// Its launch bound.
    pub max_threads: u32,
}

impl Emulated {
    /// An emulated device.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] when this build has no emulator.
    pub fn new(options: EmulatedOptions) -> Result<Self> {
        if !cfg!(longhaul_emulator) {
            return Err(CudaError::Unavailable {
                message:
                    "this build has no emulated device: it was built without a C++20 compiler or without the \
                          feature `emulator`; install g++ (11 or newer) and build again"
                        .into(),
            });
        }
        Ok(Self {
            options,
            properties: DeviceProperties {
                name: "emulated".into(),
                compute_capability: options.compute_capability,
                multiprocessors: options.multiprocessors,
                shared_bytes_per_block: 227 * 1024,
                l2_bytes: 0,
                memory_bytes: 1 << 40,
            },
            recording: Mutex::new(None),
            graphs: Mutex::new(Vec::new()),
        })
    }

    /// All kernels compiled into the emulator.
    pub fn kernels() -> Vec<EmulatedKernel> {
        let mut kernels = Vec::new();
        loop {
            let (mut name, mut params_bytes, mut max_threads) = (std::ptr::null(), 0, 0);
            // SAFETY: the pointers are to live locals; the name stays valid for the life of the process.
            let found = unsafe {
                library::longhaul_emulated_kernel(
                    kernels.len(),
                    &mut name,
                    &mut params_bytes,
                    &mut max_threads,
                )
            };
            if found == 0 || name.is_null() {
                return kernels;
            }
            // SAFETY: a string literal of the library.
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
            kernels.push(EmulatedKernel { name, params_bytes, max_threads });
        }
    }

    /// Records `work`, or runs it when nothing is being recorded.
    fn submit(&self, work: Work) -> Result<()> {
        let mut recording = lock(&self.recording);
        match recording.as_mut() {
            Some(list) => {
                list.push(work);
                Ok(())
            }
            None => {
                drop(recording);
                self.execute(&work)
            }
        }
    }

    fn execute(&self, work: &Work) -> Result<()> {
        match work {
            Work::Launch(kernel, geometry, params) => self.execute_launch(kernel, geometry, params),
            Work::Gemm(gemm) => execute_gemm(gemm),
            &Work::Copy(destination, source, bytes) => {
                // SAFETY: addresses of emulated memory are host addresses; the caller owns both ranges, which
                // `copy` may not let overlap.
                unsafe {
                    std::ptr::copy(source.0 as *const u8, destination.0 as *mut u8, bytes);
                }
                Ok(())
            }
            &Work::Fill(destination, value, bytes) => {
                // SAFETY: as above.
                unsafe { std::ptr::write_bytes(destination.0 as *mut u8, value, bytes) };
                Ok(())
            }
        }
    }

    fn execute_launch(&self, kernel: &CStr, geometry: &Geometry, params: &[u8]) -> Result<()> {
        // Parameter blocks may hold tensor maps, which are aligned to 64 bytes.
        let mut aligned = vec![TensorMap::zeroed(); params.len().div_ceil(size_of::<TensorMap>())];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        let blocks: u32 = geometry.grid.iter().product();
        let raw = RawLaunch {
            kernel: kernel.as_ptr(),
            params: aligned.as_ptr().cast(),
            params_bytes: params.len() as u64,
            seed: self.options.seed,
            grid: geometry.grid,
            block: geometry.block,
            shared_bytes: geometry.shared_bytes,
            eager: self.options.eager.into(),
            across_devices: geometry.across_devices.into(),
            resident_blocks: if geometry.cooperative { blocks } else { self.options.resident_blocks },
        };
        let mut message = vec![0 as c_char; 4096];
        // SAFETY: every pointer is to live memory of the stated size; the emulator ends the message with a zero.
        let status =
            unsafe { library::longhaul_emulated_launch_kernel(&raw, message.as_mut_ptr(), message.len()) };
        if status == 0 {
            return Ok(());
        }
        // SAFETY: zero-terminated within the buffer, which was zeroed.
        let message = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned();
        Err(CudaError::Fatal { kernel: kernel.to_string_lossy().into_owned(), message })
    }

    fn not_recording(&self, call: &str) -> Result<()> {
        match *lock(&self.recording) {
            None => Ok(()),
            Some(_) => {
                Err(CudaError::Call { call: call.into(), message: "is not possible while recording".into() })
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

const RED_ZONE: usize = 256;
/// A NaN pattern in bf16 and f32 that differs from poison.
const RED_ZONE_BYTE: u8 = 0xfd;
const POISON_BYTE: u8 = 0xff;

impl Driver for Emulated {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(self.properties.memory_bytes)
    }

    fn allocate(&self, bytes: usize, label: &str) -> Result<DevicePtr> {
        let label = CString::new(label.replace('\0', " ")).unwrap_or_default();
        // SAFETY: `label` is a C string that outlives the call.
        let memory = unsafe { library::longhaul_emulated_allocate(label.as_ptr(), bytes as u64) };
        if memory.is_null() {
            return Err(CudaError::OutOfMemory {
                what: label.to_string_lossy().into_owned(),
                bytes: bytes as u64,
                available: 0,
            });
        }
        Ok(DevicePtr(memory as u64))
    }

    fn free(&self, memory: DevicePtr) {
        // SAFETY: an address that is not a live allocation is ignored by the library.
        unsafe { library::longhaul_emulated_free(memory.0 as *mut c_void) };
    }

    fn upload(&self, destination: DevicePtr, source: &[u8]) -> Result<()> {
        self.not_recording("upload")?;
        // SAFETY: emulated addresses are host addresses; the caller owns `source.len()` bytes there.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), destination.0 as *mut u8, source.len());
        }
        Ok(())
    }

    fn download(&self, source: DevicePtr, destination: &mut [u8]) -> Result<()> {
        self.not_recording("download")?;
        // SAFETY: as in `upload`.
        unsafe {
            std::ptr::copy_nonoverlapping(source.0 as *const u8, destination.as_mut_ptr(), destination.len());
        }
        Ok(())
    }

    fn copy(&self, destination: DevicePtr, source: DevicePtr, bytes: usize) -> Result<()> {
        self.submit(Work::Copy(destination, source, bytes))
    }

    fn fill(&self, destination: DevicePtr, value: u8, bytes: usize) -> Result<()> {
        self.submit(Work::Fill(destination, value, bytes))
    }

    fn launch(&self, kernel: &str, geometry: Geometry, params: &[u8]) -> Result<()> {
        let kernel = CString::new(kernel).map_err(|_| CudaError::Call {
            call: kernel.into(),
            message: "a kernel's name has no zero byte".into(),
        })?;
        self.submit(Work::Launch(kernel, geometry, params.to_vec()))
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.submit(Work::Gemm(*gemm))
    }

    fn tensor_map(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap> {
        const CALL: &str = "tensor_map";
        let rank = spec.rank()?;
        let mut raw = RawTensor {
            address: spec.address.0,
            rank: rank as u32,
            element_bytes: spec.element.size() as u32,
            swizzle: spec.swizzle.span(),
            ..RawTensor::default()
        };
        raw.dims[..rank].copy_from_slice(spec.dims);
        raw.strides[1..rank].copy_from_slice(spec.strides);
        raw.box_dims[..rank].copy_from_slice(spec.box_dims);
        let mut map = TensorMap::zeroed();
        let mut message = vec![0 as c_char; 512];
        // SAFETY: `raw` mirrors longhaul_emulated_tensor; the map has 16 words; the message is ended within its bytes.
        let status = unsafe {
            library::longhaul_emulated_tensor_map(
                &raw,
                map.0.as_mut_ptr(),
                message.as_mut_ptr(),
                message.len(),
            )
        };
        if status == 0 {
            return Ok(map);
        }
        // SAFETY: zero-terminated within the buffer, which was zeroed.
        let message = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned();
        Err(CudaError::shape(CALL, message))
    }

    fn synchronise(&self) -> Result<()> {
        self.not_recording("synchronise")
    }

    fn begin_recording(&self) -> Result<()> {
        self.not_recording("begin_recording")?;
        *lock(&self.recording) = Some(Vec::new());
        Ok(())
    }

    fn end_recording(&self) -> Result<GraphId> {
        let work = lock(&self.recording).take().ok_or_else(|| CudaError::Call {
            call: "end_recording".into(),
            message: "nothing is being recorded".into(),
        })?;
        let mut graphs = lock(&self.graphs);
        graphs.push(Some(work));
        Ok(GraphId(graphs.len() - 1))
    }

    fn drop_graph(&self, graph: GraphId) {
        if let Some(work) = lock(&self.graphs).get_mut(graph.0) {
            *work = None;
        }
    }

    fn replay(&self, graph: GraphId) -> Result<()> {
        self.not_recording("replay")?;
        let work = lock(&self.graphs).get(graph.0).cloned().flatten().ok_or_else(|| CudaError::Call {
            call: "replay".into(),
            message: format!("there is no graph {}", graph.0),
        })?;
        work.iter().try_for_each(|work| self.execute(work))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f32>> {
        work()?;
        Ok(None)
    }

    fn peer_handle(&self) -> PeerHandle {
        PeerHandle::Emulated
    }

    /// Emulated devices share the host's addresses.
    fn map_peer(&self, peer: &PeerHandle) -> Result<bool> {
        Ok(*peer == PeerHandle::Emulated)
    }

    fn host_word(&self) -> Result<Box<dyn HostWord>> {
        let word = Word(self.allocate(4, "a word that the host sets")?);
        word.set(0);
        Ok(Box::new(word))
    }

    fn red_zone_bytes(&self) -> usize {
        RED_ZONE
    }

    fn poison(&self, memory: DevicePtr, bytes: usize) {
        // SAFETY: the arena owns the range and the red zone behind it.
        unsafe {
            std::ptr::write_bytes(memory.0 as *mut u8, POISON_BYTE, bytes);
            std::ptr::write_bytes((memory.0 as *mut u8).add(bytes), RED_ZONE_BYTE, RED_ZONE);
        }
    }

    fn check_red_zone(&self, memory: DevicePtr, bytes: usize, label: &str) -> Result<()> {
        // SAFETY: as in `poison`.
        let zone = unsafe { std::slice::from_raw_parts((memory.0 as *const u8).add(bytes), RED_ZONE) };
        match zone.iter().position(|&b| b != RED_ZONE_BYTE) {
            None => Ok(()),
            Some(at) => Err(CudaError::Fatal {
                kernel: label.into(),
                message: format!("byte {} of a tensor of {bytes} bytes was written", bytes + at),
            }),
        }
    }
}

/// Four bytes of emulated memory, which is host memory.
struct Word(DevicePtr);

impl HostWord for Word {
    fn address(&self) -> DevicePtr {
        self.0
    }

    fn set(&self, value: u32) {
        // SAFETY: four aligned bytes that live as long as `self`; kernels read them atomically.
        unsafe { AtomicU32::from_ptr(self.0.0 as *mut u32) }.store(value, Ordering::Release);
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        // SAFETY: taken by `allocate`.
        unsafe { library::longhaul_emulated_free(self.0.0 as *mut c_void) };
    }
}

/// `count` elements at `address`, widened.
fn read_row(address: DevicePtr, element: Element, count: usize, out: &mut Vec<f32>) {
    out.clear();
    match element {
        Element::F32 => {
            // SAFETY: the caller's operand has `count` elements here.
            let row = unsafe { std::slice::from_raw_parts(address.0 as *const f32, count) };
            out.extend_from_slice(row);
        }
        _ => {
            // SAFETY: as above.
            let row = unsafe { std::slice::from_raw_parts(address.0 as *const u16, count) };
            out.extend(row.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)));
        }
    }
}

/// A plain product: f32 sums in sixteen interleaved lanes, so that the order depends on k only.
fn execute_gemm(g: &Gemm) -> Result<()> {
    if !matches!(g.element, Element::F32 | Element::Bf16)
        || !matches!(g.out_element, Element::F32 | Element::Bf16)
    {
        return Err(CudaError::Unsupported(format!("gemm of {:?} to {:?}", g.element, g.out_element)));
    }
    const LANES: usize = 16;
    let size = g.element.size();
    let mut x = Vec::with_capacity(g.m);
    for row in 0..g.m {
        let mut values = Vec::with_capacity(g.k);
        read_row(g.x.offset(row * g.x_stride * size), g.element, g.k, &mut values);
        x.push(values);
    }
    let mut weight = Vec::with_capacity(g.k);
    for n in 0..g.n {
        read_row(g.weight.offset(n * g.weight_stride * size), g.element, g.k, &mut weight);
        let mut bias = Vec::new();
        if g.bias != DevicePtr::NULL {
            read_row(g.bias.offset(n * 4), Element::F32, 1, &mut bias);
        }
        for (row, x) in x.iter().enumerate() {
            let mut lanes = [0f32; LANES];
            let (mut xs, mut ws) = (x.chunks_exact(LANES), weight.chunks_exact(LANES));
            for (a, b) in (&mut xs).zip(&mut ws) {
                for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                    *lane += a * b;
                }
            }
            let tail: f32 = xs.remainder().iter().zip(ws.remainder()).map(|(a, b)| a * b).sum();
            let sum = lanes.iter().sum::<f32>() + tail + bias.first().copied().unwrap_or(0.0);
            let out = g.out.offset((row * g.out_stride + n) * g.out_element.size());
            // SAFETY: the caller's output has `n` elements in each of its `m` rows.
            unsafe {
                match g.out_element {
                    Element::F32 => (out.0 as *mut f32).write(sum),
                    _ => (out.0 as *mut u16).write(bf16::from_f32(sum).to_bits()),
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_not_there_is_named() {
        let driver = Emulated::new(EmulatedOptions::default()).unwrap();
        let error = driver.launch("no_such_kernel", Geometry::linear(1, 32), &[]).unwrap_err();
        assert!(error.to_string().contains("no_such_kernel"), "{error}");
        assert!(error.is_fatal());
    }

    #[test]
    fn tensor_maps_follow_the_rules() {
        use super::super::Swizzle;
        let driver = Emulated::new(EmulatedOptions::default()).unwrap();
        let spec = TensorMapSpec {
            address: DevicePtr(4096),
            element: Element::Bf16,
            dims: &[128, 10],
            strides: &[256],
            box_dims: &[64, 8],
            swizzle: Swizzle::Bytes128,
        };
        let map = driver.tensor_map(&spec).unwrap();
        assert_ne!(map, driver.tensor_map(&TensorMapSpec { dims: &[128, 11], ..spec }).unwrap());
        let message = |spec: &TensorMapSpec<'_>| driver.tensor_map(spec).unwrap_err().to_string();
        assert!(message(&TensorMapSpec { box_dims: &[32, 8], ..spec }).contains("64 bytes wide"));
        assert!(message(&TensorMapSpec { box_dims: &[64, 300], ..spec }).contains("300 elements"));
        assert!(message(&TensorMapSpec { strides: &[250], ..spec }).contains("multiple of 16"));
        assert!(message(&TensorMapSpec { strides: &[], ..spec }).contains("0 strides"));
        assert!(message(&TensorMapSpec { address: DevicePtr(4104), ..spec }).contains("address"));
    }

    #[test]
    fn uploads_do_not_go_into_a_recording() {
        let driver = Emulated::new(EmulatedOptions::default()).unwrap();
        let memory = driver.allocate(64, "test").unwrap();
        driver.begin_recording().unwrap();
        assert!(driver.upload(memory, &[0; 8]).is_err());
        driver.fill(memory, 7, 64).unwrap();
        let graph = driver.end_recording().unwrap();
        let mut bytes = [0u8; 64];
        driver.download(memory, &mut bytes).unwrap();
        assert_eq!(bytes, [0xff; 64], "recording runs nothing");
        driver.replay(graph).unwrap();
        driver.download(memory, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 64]);
        driver.free(memory);
    }

    #[test]
    fn the_plain_product_matches_f64() {
        let driver = Emulated::new(EmulatedOptions::default()).unwrap();
        let (m, n, k) = (3, 5, 37);
        let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let w: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.11).cos()).collect();
        let put = |v: &[f32]| {
            let p = driver.allocate(v.len() * 4, "operand").unwrap();
            driver.upload(p, bytemuck::cast_slice(v)).unwrap();
            p
        };
        let (px, pw, pb) = (put(&x), put(&w), put(&[0.5; 5]));
        let out = driver.allocate(m * n * 4, "out").unwrap();
        let gemm = Gemm {
            x: px,
            x_stride: k,
            weight: pw,
            weight_stride: k,
            bias: pb,
            out,
            out_stride: n,
            m,
            n,
            k,
            element: Element::F32,
            out_element: Element::F32,
        };
        driver.gemm(&gemm).unwrap();
        let mut bytes = vec![0u8; m * n * 4];
        driver.download(out, &mut bytes).unwrap();
        let got: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        for row in 0..m {
            for col in 0..n {
                let exact: f64 =
                    (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(w[col * k + i])).sum::<f64>() + 0.5;
                assert!((f64::from(got[row * n + col]) - exact).abs() < 1e-5);
            }
        }
        for memory in [px, pw, pb, out] {
            driver.free(memory);
        }
    }
}
