//! The GPU: the driver API of CUDA through `cudarc`, and cuBLASLt.
//!
//! Opening a device takes its primary context, one stream, the page-locked buffers, the library's workspace and every
//! kernel; from then on the only allocations are the caller's. Each call binds the context to the calling thread, so a
//! driver may be used from any thread, one at a time.

mod context;
mod device_code;
mod gemm;
mod graph;
mod libraries;
mod peer;
mod probe;
mod staging;
mod status;
mod tensor_map;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUdeviceptr};

use self::context::{Event, Stream};
use self::device_code::Functions;
use self::gemm::{Bias, Products, WORKSPACE_BYTES};
use self::graph::Graphs;
use self::staging::{Downloads, Uploads};
use self::status::{Status, check};
use super::{
    DeviceProperties, DevicePtr, Driver, Gemm, Geometry, GraphId, HostWord, PeerHandle, TensorMap,
    TensorMapSpec,
};
use crate::{CudaError, Result};

/// Waits after every launch, so that a fault names its kernel (debugging; slow).
const SYNCHRONOUS: &str = "LONGHAUL_CUDA_SYNC";

/// One GPU.
pub struct Gpu {
    // Dropped in this order, after `drop` has waited for the stream; the context goes with the last handle to the stream.
    graphs: Mutex<Graphs>,
    products: Mutex<Products>,
    uploads: Mutex<Uploads>,
    downloads: Mutex<Downloads>,
    functions: Functions,
    stream: Arc<Stream>,
    properties: DeviceProperties,
    workspace: DevicePtr,
    /// Wait after every launch.
    synchronous: bool,
    /// What was queued last, for errors that show later.
    last: Mutex<Option<&'static str>>,
}

impl Gpu {
    /// What devices the machine has, whether or not they can be used.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] with the remedy: no driver, or one that is too old or does not start; no device.
    pub fn probe() -> Result<Vec<DeviceProperties>> {
        probe::devices()?.into_iter().map(probe::properties).collect()
    }

    /// Whether the machine has devices and a driver that starts, usable or not.
    pub fn is_present() -> bool {
        probe::is_present()
    }

    /// Opens the device that CUDA counts as `ordinal`.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] with the remedy: those of [`Gpu::probe`], an ordinal that is not there, a device that is
    /// too old, a missing library, damaged device code. [`CudaError::OutOfMemory`] when others fill the device.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let (device, properties) = probe::device(ordinal)?;
        // What needs no context comes first: a missing library should not wait for one.
        libraries::load_cublaslt()?;
        let code = device_code::device_code();
        device_code::verify(code)?;
        let stream = Stream::new(device)?;
        let functions = Functions::load(&stream, code, &crate::kernels(), &properties)?;
        let uploads = Uploads::new(&stream)?;
        let downloads = Downloads::new(&stream)?;
        let workspace = DevicePtr(allocate(WORKSPACE_BYTES, "workspace of matrix products")?);
        let products = match Products::new(&stream, workspace) {
            Ok(products) => products,
            Err(error) => {
                // SAFETY: taken above, used by nobody.
                let _ = unsafe { sys::cuMemFree_v2(workspace.0) };
                return Err(error);
            }
        };
        Ok(Gpu {
            graphs: Mutex::new(Graphs::new(&stream)),
            products: Mutex::new(products),
            uploads: Mutex::new(uploads),
            downloads: Mutex::new(downloads),
            functions,
            stream,
            properties,
            workspace,
            synchronous: std::env::var_os(SYNCHRONOUS).is_some_and(|v| v == "1" || v == "true"),
            last: Mutex::new(None),
        })
    }

    /// The error of `call`: a fault that ends the context came from a kernel, most likely the last one.
    fn blame(&self, call: &str, status: Status) -> CudaError {
        match (status.error(call), *lock(&self.last)) {
            (CudaError::Fatal { message, .. }, Some(kernel)) => CudaError::Fatal {
                kernel: format!("{kernel} or a kernel before it"),
                message: format!(
                    "{message} (shown by {call}; {SYNCHRONOUS}=1 waits after each launch and names the kernel)"
                ),
            },
            (error, _) => error,
        }
    }

    /// The outcome of `call`.
    fn check(&self, call: &str, result: sys::CUresult) -> Result<()> {
        Status::of(result).map_err(|status| self.blame(call, status))
    }

    fn launch_raw(
        &self,
        function: device_code::Function,
        geometry: Geometry,
        params: &[u8],
    ) -> sys::CUresult {
        let [gx, gy, gz] = geometry.grid;
        let [bx, by, bz] = geometry.block;
        let (shared, stream) = (geometry.shared_bytes, self.stream.raw());
        let mut arguments: [*mut c_void; 1] = [params.as_ptr().cast_mut().cast()];
        let arguments = arguments.as_mut_ptr();
        // SAFETY: the function lives as long as `self`; its one parameter has `params.len()` bytes, which the driver copies
        // before it returns. What the kernel reads and writes is the caller's memory.
        unsafe {
            if geometry.cooperative {
                let f = sys::cuLaunchCooperativeKernel;
                f(function.raw, gx, gy, gz, bx, by, bz, shared, stream, arguments)
            } else {
                let f = sys::cuLaunchKernel;
                f(function.raw, gx, gy, gz, bx, by, bz, shared, stream, arguments, std::ptr::null_mut())
            }
        }
    }

    /// In debugging, waits for what was just queued.
    fn wait_if_synchronous(&self, what: &str) -> Result<()> {
        if !self.synchronous || lock(&self.graphs).is_recording() {
            return Ok(());
        }
        self.stream.wait().map_err(|status| status.error(what))
    }
}

/// Takes device memory. The context is current.
fn allocate(bytes: usize, label: &str) -> Result<CUdeviceptr> {
    let mut memory = 0;
    // SAFETY: `memory` is a live local.
    Status::of(unsafe { sys::cuMemAlloc_v2(&mut memory, bytes) }).map_err(|status| match status {
        Status::OUT_OF_MEMORY => CudaError::OutOfMemory {
            what: label.into(),
            bytes: bytes as u64,
            available: free_bytes().unwrap_or(0),
        },
        other => other.error(&format!("allocating {label}")),
    })?;
    Ok(memory)
}

/// Free device memory. The context is current.
fn free_bytes() -> Result<u64> {
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: both are live locals.
    check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
    Ok(free as u64)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver for Gpu {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn free_bytes(&self) -> Result<u64> {
        self.stream.bind()?;
        free_bytes()
    }

    fn allocate(&self, bytes: usize, label: &str) -> Result<DevicePtr> {
        self.stream.bind()?;
        Ok(DevicePtr(allocate(bytes, label)?))
    }

    fn free(&self, memory: DevicePtr) {
        if memory == DevicePtr::NULL {
            return;
        }
        // No failure here is worth more than the one that made the owner drop its memory.
        let _ = self.stream.bind();
        let mut graphs = lock(&self.graphs);
        if graphs.is_recording() {
            graphs.free_later(memory.0);
            return;
        }
        drop(graphs);
        let _ = self.stream.wait();
        // SAFETY: taken by `allocate`, and no work uses it any more.
        let _ = unsafe { sys::cuMemFree_v2(memory.0) };
    }

    fn upload(&self, destination: DevicePtr, source: &[u8]) -> Result<()> {
        self.stream.bind()?;
        lock(&self.graphs).not_recording("upload")?;
        lock(&self.uploads).copy(destination, source, &|call, status| self.blame(call, status))
    }

    fn download(&self, source: DevicePtr, destination: &mut [u8]) -> Result<()> {
        self.stream.bind()?;
        lock(&self.graphs).not_recording("download")?;
        lock(&self.downloads).copy(source, destination, &|call, status| self.blame(call, status))
    }

    fn copy(&self, destination: DevicePtr, source: DevicePtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.stream.bind()?;
        // SAFETY: the caller owns `bytes` at both addresses.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(destination.0, source.0, bytes, self.stream.raw()) };
        self.check("copy", result)
    }

    fn fill(&self, destination: DevicePtr, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.stream.bind()?;
        // SAFETY: the caller owns `bytes` at the address.
        let result = unsafe { sys::cuMemsetD8Async(destination.0, value, bytes, self.stream.raw()) };
        self.check("fill", result)
    }

    fn launch(&self, kernel: &str, geometry: Geometry, params: &[u8]) -> Result<()> {
        let call = |message: String| CudaError::Call { call: kernel.into(), message };
        let (name, function) =
            self.functions.get(kernel).ok_or_else(|| call("there is no such kernel".into()))?;
        if params.len() != function.params_bytes {
            return Err(call(format!(
                "takes a parameter block of {} bytes, not {}",
                function.params_bytes,
                params.len()
            )));
        }
        self.stream.bind()?;
        let result = self.launch_raw(function, geometry, params);
        // A sticky status here is of an earlier kernel.
        Status::of(result).map_err(|status| match self.blame(kernel, status) {
            CudaError::Call { message, .. } => call(format!("{message} ({geometry:?})")),
            other => other,
        })?;
        *lock(&self.last) = Some(name);
        self.wait_if_synchronous(name)
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        if Bias::of(gemm) == Bias::InOutput {
            for (kernel, geometry, params) in crate::ops::gemm::bias_rows(gemm) {
                self.launch(kernel, geometry, &params)?;
            }
        }
        self.stream.bind()?;
        let queued = lock(&self.products).run(gemm);
        if let Err(error) = queued {
            // The library hides what the driver said; a lost context must show as one.
            let recording = lock(&self.graphs).is_recording();
            let lost = if recording { None } else { self.stream.wait().err() };
            return Err(match lost {
                Some(status) if status.is_sticky() => self.blame("matrix product", status),
                _ => error,
            });
        }
        *lock(&self.last) = Some("a matrix product of cuBLASLt");
        self.wait_if_synchronous("a matrix product of cuBLASLt")
    }

    fn tensor_map(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap> {
        // Without the instructions the driver may lack the call, too.
        if self.properties.compute_capability < 90 {
            return Err(CudaError::Unsupported(format!(
                "{} has no tensor maps: they need compute capability 9.0",
                self.properties.name
            )));
        }
        self.stream.bind()?;
        tensor_map::encode(spec)
    }

    fn peer_handle(&self) -> PeerHandle {
        self.stream.peer_handle()
    }

    fn map_peer(&self, peer: &PeerHandle) -> Result<bool> {
        peer::map(&self.stream, peer)
    }

    fn host_word(&self) -> Result<Box<dyn HostWord>> {
        self.stream.bind()?;
        Ok(Box::new(peer::Word::new(&self.stream)?))
    }

    fn raw_stream(&self) -> Result<Option<usize>> {
        self.stream.bind()?;
        Ok(Some(self.stream.raw() as usize))
    }

    fn synchronise(&self) -> Result<()> {
        self.stream.bind()?;
        lock(&self.graphs).not_recording("synchronise")?;
        self.stream.wait().map_err(|status| self.blame("synchronise", status))
    }

    fn begin_recording(&self) -> Result<()> {
        self.stream.bind()?;
        lock(&self.graphs).begin(&|call, status| self.blame(call, status))
    }

    fn end_recording(&self) -> Result<GraphId> {
        self.stream.bind()?;
        lock(&self.graphs).end(&|call, status| self.blame(call, status))
    }

    fn drop_graph(&self, graph: GraphId) {
        let _ = self.stream.bind();
        let _ = self.stream.wait();
        lock(&self.graphs).remove(graph);
    }

    fn replay(&self, graph: GraphId) -> Result<()> {
        self.stream.bind()?;
        lock(&self.graphs).replay(graph, &|call, status| self.blame(call, status))?;
        *lock(&self.last) = Some("a kernel of a recorded step");
        self.wait_if_synchronous("a recorded step")
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f32>> {
        self.stream.bind()?;
        lock(&self.graphs).not_recording("time")?;
        let (before, after) = (Event::new(&self.stream, true)?, Event::new(&self.stream, true)?);
        before.record()?;
        work()?;
        self.stream.bind()?;
        after.record()?;
        after.wait().map_err(|status| self.blame("time", status))?;
        before.milliseconds_until(&after).map(Some)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let _ = self.stream.bind();
        let _ = self.stream.wait();
        // SAFETY: taken by `open`; the stream has passed.
        let _ = unsafe { sys::cuMemFree_v2(self.workspace.0) };
    }
}
