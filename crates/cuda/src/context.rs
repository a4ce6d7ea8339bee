//! What an op needs: the driver, the arena, the choice of kernels, and typed launches.

use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;

use crate::arena::Arena;
use crate::driver::{DevicePtr, Driver, Element, Geometry, Memory};
use crate::tensor::{Tensor, padded_cols};
use crate::{CudaError, Result};

/// Which implementation of an op runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Variant {
    /// The fastest that takes the shape on this device.
    #[default]
    Auto,
    /// The plain kernels: obviously right, to find a wrong fast one by bisection.
    Plain,
    /// The mma.sync kernels where they take the shape (sm_80 and newer), else plain.
    Mma,
}

/// A kernel with the type of its parameter block.
pub struct Kernel<P> {
    name: &'static str,
    params: PhantomData<fn(P)>,
}

impl<P: Pod> Kernel<P> {
    /// The kernel exported under `name` (`LONGHAUL_KERNEL` in `cuda/`).
    pub const fn new(name: &'static str) -> Self {
        Self { name, params: PhantomData }
    }

    /// Entry point.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// What the registry says about it.
    pub const fn info(&self) -> KernelInfo {
        KernelInfo { name: self.name, params_bytes: size_of::<P>() }
    }
}

/// One line of the kernel registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelInfo {
    /// Entry point.
    pub name: &'static str,
    /// Size of its parameter block.
    pub params_bytes: usize,
}

/// Driver, arena and kernel choice of one rank. Cloning shares all.
#[derive(Clone)]
pub struct Context {
    /// The device.
    pub driver: Arc<dyn Driver>,
    /// Memory of a step's tensors.
    pub arena: Arena,
    /// Which kernels run.
    pub variant: Variant,
    /// Element of activations, and of weights and KV unless they say otherwise: bf16, or f32 for debugging.
    pub element: Element,
    counters: Arc<Memory>,
}

impl Context {
    /// Arrival counters that kernels share: zero before and after every launch.
    pub(crate) const COUNTERS: usize = 1 << 16;

    /// Takes the shared counters from `driver`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(driver: Arc<dyn Driver>, arena: Arena, variant: Variant, element: Element) -> Result<Self> {
        let counters = Memory::new(&driver, Self::COUNTERS * 4, "arrival counters")?;
        driver.fill(counters.address(), 0, counters.bytes())?;
        Ok(Self { driver, arena, variant, element, counters: Arc::new(counters) })
    }

    /// Address of the shared arrival counters.
    pub(crate) fn counters(&self) -> DevicePtr {
        self.counters.address()
    }

    /// An uninitialised tensor from the arena. `op` names it in messages.
    ///
    /// # Errors
    /// The arena is full.
    pub fn tensor(&self, op: &'static str, rows: usize, cols: usize, element: Element) -> Result<Tensor> {
        let bytes = rows
            .checked_mul(padded_cols(cols, element))
            .and_then(|n| n.checked_mul(element.size()))
            .ok_or_else(|| CudaError::shape(op, format!("[{rows}, {cols}] overflows")))?;
        Ok(Tensor::new(self.arena.take(bytes, op)?, rows, cols, element))
    }

    /// Launches `kernel`.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch<P: Pod>(&self, kernel: &Kernel<P>, geometry: Geometry, params: P) -> Result<()> {
        self.driver.launch(kernel.name, geometry, bytemuck::bytes_of(&params))
    }

    /// Whether mma.sync kernels may run: the device has them and the variant allows them.
    pub fn allows_mma(&self) -> bool {
        self.variant != Variant::Plain && self.driver.properties().compute_capability >= 80
    }

    /// Copies host values to a new tensor (tests, small inputs).
    ///
    /// # Errors
    /// The arena is full, or a count that is not `rows * cols`.
    pub fn tensor_from_f32(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<Tensor> {
        const OP: &str = "tensor_from_f32";
        if values.len() != rows * cols {
            return Err(CudaError::shape(OP, format!("{} values for [{rows}, {cols}]", values.len())));
        }
        let tensor = self.tensor(OP, rows, cols, element)?;
        for (row, line) in values.chunks_exact(cols.max(1)).enumerate() {
            let bytes: Vec<u8> = match element {
                Element::F32 => bytemuck::cast_slice(line).to_vec(),
                Element::Bf16 => line.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
                other => return Err(CudaError::Unsupported(format!("{OP}: {other:?}"))),
            };
            self.driver.upload(tensor.row_address(row), &bytes)?;
        }
        Ok(tensor)
    }

    /// Copies a tensor to the host, widened to f32, row-major without padding.
    ///
    /// # Errors
    /// The driver's.
    pub fn tensor_to_f32(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        let size = tensor.element.size();
        let mut bytes = vec![0u8; tensor.rows * tensor.stride * size];
        self.driver.download(tensor.address(), &mut bytes)?;
        let mut values = Vec::with_capacity(tensor.rows * tensor.cols);
        for line in bytes.chunks_exact((tensor.stride * size).max(1)) {
            let line = &line[..tensor.cols * size];
            match tensor.element {
                Element::F32 => {
                    values.extend(line.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                }
                Element::Bf16 => values
                    .extend(line.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())),
                other => return Err(CudaError::Unsupported(format!("tensor_to_f32: {other:?}"))),
            }
        }
        Ok(values)
    }

    /// Address of an optional operand, null when there is none.
    pub fn optional(tensor: Option<&Tensor>) -> DevicePtr {
        tensor.map_or(DevicePtr::NULL, Tensor::address)
    }
}
