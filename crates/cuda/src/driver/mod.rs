//! What the device is driven through: memory, copies, launches, dense products, recorded graphs.
//!
//! Two implementations run the same kernels: `cudarc` on a GPU and `emulated` on the CPU. All work of a driver is ordered
//! on one stream.

mod emulated;
#[cfg(feature = "cuda")]
mod gpu;
mod tensor_map;

use std::fmt;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::{CudaError, Result};

pub use emulated::{Emulated, EmulatedOptions};
#[cfg(feature = "cuda")]
pub use gpu::Gpu;
pub use tensor_map::{Swizzle, TensorMap, TensorMapSpec};

/// An address in device memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// No address: an operand that is not there.
    pub const NULL: DevicePtr = DevicePtr(0);

    /// The address `bytes` further.
    pub fn offset(self, bytes: usize) -> DevicePtr {
        DevicePtr(self.0 + bytes as u64)
    }
}

impl fmt::Debug for DevicePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// What a kernel selection and a memory plan need to know about the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceProperties {
    /// Name for reports.
    pub name: String,
    /// Compute capability, as 80 for 8.0.
    pub compute_capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most dynamic shared memory a block may have, bytes.
    pub shared_bytes_per_block: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: u64,
    /// Bytes of device memory.
    pub memory_bytes: u64,
}

impl DeviceProperties {
    /// Blocks with `bytes` of shared memory that fit on a multiprocessor at once, at least 1. A multiprocessor has 1 KiB more
    /// than a block may take, and every block costs it 1 KiB (CUDA C++ Programming Guide, "Compute Capabilities").
    pub fn resident_blocks(&self, bytes: usize) -> u32 {
        const RESERVED: u32 = 1024;
        ((self.shared_bytes_per_block + RESERVED) / (bytes as u32 + RESERVED)).max(1)
    }
}

/// Grid, block and shared memory of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub shared_bytes: u32,
    /// Blocks wait for each other, so all must be resident at once.
    pub cooperative: bool,
    /// Blocks wait for launches on other devices.
    pub across_devices: bool,
}

impl Geometry {
    /// `grid` blocks of `threads` threads, no dynamic shared memory.
    pub fn linear(grid: usize, threads: u32) -> Self {
        Self::grid([grid as u32, 1, 1], threads)
    }

    /// A grid of blocks of `threads` threads, no dynamic shared memory.
    pub fn grid(grid: [u32; 3], threads: u32) -> Self {
        Self { grid, block: [threads, 1, 1], shared_bytes: 0, cooperative: false, across_devices: false }
    }

    /// With `bytes` of dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared_bytes: bytes as u32, ..self }
    }
}

/// Element types the device computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// FP8 E4M3 (KV cache only).
    E4m3,
    /// 32-bit integers (indices).
    U32,
}

impl Element {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Element::F32 | Element::U32 => 4,
            Element::Bf16 => 2,
            Element::E4m3 => 1,
        }
    }
}

/// `out[m, n] = x[m, k] · weight[n, k]ᵀ`, row-major, f32 accumulation; the library product for many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gemm {
    /// `[m, k]`, rows `x_stride` elements apart.
    pub x: DevicePtr,
    /// Elements between rows of x.
    pub x_stride: usize,
    /// `[n, k]`, rows `weight_stride` elements apart, of the same element as x.
    pub weight: DevicePtr,
    /// Elements between rows of the weight.
    pub weight_stride: usize,
    /// f32 `[n]`, or null.
    pub bias: DevicePtr,
    /// `[m, n]`, rows `out_stride` elements apart.
    pub out: DevicePtr,
    /// Elements between rows of the output.
    pub out_stride: usize,
    /// Rows of x.
    pub m: usize,
    /// Rows of the weight.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
    /// Element of x and the weight.
    pub element: Element,
    /// Element of the output.
    pub out_element: Element,
}

/// A recorded sequence of launches, products and copies on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GraphId(pub usize);

/// What another device needs to map the memory of this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerHandle {
    /// An emulated device of this process.
    Emulated,
    /// A GPU of this process: its context (`CUcontext`) and device (`CUdevice`).
    Gpu {
        /// The address of the context.
        context: usize,
        /// The driver's number of the device.
        device: i32,
    },
}

/// A word of host memory that kernels of every device of the process read while the host sets it.
pub trait HostWord: Send + Sync {
    /// Where kernels find it.
    fn address(&self) -> DevicePtr;

    /// Sets it, without waiting for any device.
    fn set(&self, value: u32);
}

/// A device: memory, and a stream on which everything runs in call order.
pub trait Driver: Send + Sync {
    /// The device.
    fn properties(&self) -> &DeviceProperties;

    /// Bytes of device memory that are free now.
    ///
    /// # Errors
    /// The driver's.
    fn free_bytes(&self) -> Result<u64>;

    /// Takes `bytes` of device memory, aligned to 256 bytes, contents undefined. `label` names it in messages.
    ///
    /// # Errors
    /// [`crate::CudaError::OutOfMemory`].
    fn allocate(&self, bytes: usize, label: &str) -> Result<DevicePtr>;

    /// Gives memory back once the stream has passed.
    fn free(&self, memory: DevicePtr);

    /// Copies host bytes to the device in stream order. `source` may be reused at once.
    ///
    /// # Errors
    /// The driver's.
    fn upload(&self, destination: DevicePtr, source: &[u8]) -> Result<()>;

    /// Waits for the stream and copies device bytes to the host.
    ///
    /// # Errors
    /// The driver's, and those of earlier work that only show now.
    fn download(&self, source: DevicePtr, destination: &mut [u8]) -> Result<()>;

    /// Copies within the device.
    ///
    /// # Errors
    /// The driver's.
    fn copy(&self, destination: DevicePtr, source: DevicePtr, bytes: usize) -> Result<()>;

    /// Sets bytes.
    ///
    /// # Errors
    /// The driver's.
    fn fill(&self, destination: DevicePtr, value: u8, bytes: usize) -> Result<()>;

    /// Launches a kernel by its name with its parameter block.
    ///
    /// # Errors
    /// No such kernel, an impossible geometry, or (emulated) a fault of the kernel.
    fn launch(&self, kernel: &str, geometry: Geometry, params: &[u8]) -> Result<()>;

    /// A dense product by the vendor's library (GPU) or a plain loop (emulated).
    ///
    /// # Errors
    /// The library's.
    fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// Waits for all work.
    ///
    /// # Errors
    /// Those of earlier work.
    fn synchronise(&self) -> Result<()>;

    /// From now on, record work instead of running it.
    ///
    /// # Errors
    /// Recording already.
    fn begin_recording(&self) -> Result<()>;

    /// Ends the recording; nothing of it has run yet.
    ///
    /// # Errors
    /// Not recording, or an operation in between that cannot be recorded.
    fn end_recording(&self) -> Result<GraphId>;

    /// Gives a recording back once the stream has passed; its number is not used again.
    fn drop_graph(&self, graph: GraphId);

    /// Runs a recording.
    ///
    /// # Errors
    /// Those of its work.
    fn replay(&self, graph: GraphId) -> Result<()>;

    /// Milliseconds the device spends on what `work` queues (CUDA events); `None` where time means nothing (emulated).
    ///
    /// # Errors
    /// Those of `work`.
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f32>>;

    /// Encodes a tensor map for the parameter block of a kernel (sm_90).
    ///
    /// # Errors
    /// A specification that breaks the rules of [`TensorMapSpec`], or a device without tensor maps.
    fn tensor_map(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap> {
        let _ = spec;
        Err(CudaError::Unsupported("this driver makes no tensor maps".into()))
    }

    /// What [`Driver::map_peer`] of another device takes.
    fn peer_handle(&self) -> PeerHandle;

    /// Maps the memory of another device, present and future, at the addresses it has there; false where the two devices
    /// cannot.
    ///
    /// # Errors
    /// The driver's.
    fn map_peer(&self, peer: &PeerHandle) -> Result<bool>;

    /// Takes a word of host memory, zero.
    ///
    /// # Errors
    /// No memory.
    fn host_word(&self) -> Result<Box<dyn HostWord>>;

    /// Makes the device current on the calling thread and returns its stream (`CUstream`), for libraries that queue work;
    /// `None` where there is no such thing (emulated).
    ///
    /// # Errors
    /// The driver's.
    fn raw_stream(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Bytes left free behind each tensor of the arena, to be checked by [`Driver::check_red_zone`]; 0 on a GPU.
    fn red_zone_bytes(&self) -> usize {
        0
    }

    /// Marks memory as unwritten and the red zone behind it as untouched (debugging aid of the emulator).
    fn poison(&self, memory: DevicePtr, bytes: usize) {
        let _ = (memory, bytes);
    }

    /// Whether the red zone behind `[memory, memory + bytes)` is untouched.
    ///
    /// # Errors
    /// [`crate::CudaError::Fatal`] naming `label` when it was written.
    fn check_red_zone(&self, memory: DevicePtr, bytes: usize, label: &str) -> Result<()> {
        let _ = (memory, bytes, label);
        Ok(())
    }
}

/// Device memory that frees itself.
pub struct Memory {
    driver: Arc<dyn Driver>,
    address: DevicePtr,
    bytes: usize,
}

impl Memory {
    /// Takes `bytes` (at least one byte is taken) from `driver`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize, label: &str) -> Result<Self> {
        let address = driver.allocate(bytes.max(1), label)?;
        Ok(Self { driver: driver.clone(), address, bytes })
    }

    /// Memory holding `bytes`.
    ///
    /// # Errors
    /// No memory, or a failed copy.
    pub fn from_bytes(driver: &Arc<dyn Driver>, bytes: &[u8], label: &str) -> Result<Self> {
        let memory = Self::new(driver, bytes.len(), label)?;
        if !bytes.is_empty() {
            driver.upload(memory.address, bytes)?;
        }
        Ok(memory)
    }

    /// Where it is.
    pub fn address(&self) -> DevicePtr {
        self.address
    }

    /// How much it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({:?}, {} bytes)", self.address, self.bytes)
    }
}
