//! Weights on the device.

use std::borrow::Cow;
use std::sync::Arc;

use longhaul_backend::{DType, HostTensor};

use crate::driver::{DevicePtr, Driver, Element, Memory};
use crate::tensor::padded_cols;
use crate::{CudaError, Result};

/// A weight matrix `[rows, cols]`, row-major, rows aligned to 16 bytes and padded with zeros. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Matrix {
    memory: Arc<Memory>,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Elements between the starts of rows.
    pub stride: usize,
    /// Element type.
    pub element: Element,
}

impl Matrix {
    /// Stacks `parts` by rows and moves them to the device as `element` (bf16 or f32).
    ///
    /// # Errors
    /// Parts of different widths, or no memory.
    pub fn new(driver: &Arc<dyn Driver>, parts: &[HostTensor<'_>], element: Element) -> Result<Self> {
        const OP: &str = "matrix";
        let mut rows = 0;
        let mut cols = None;
        for part in parts {
            let (r, c) = part.matrix_dims().map_err(|e| CudaError::shape(OP, e.to_string()))?;
            if *cols.get_or_insert(c) != c {
                return Err(CudaError::shape(OP, format!("parts of {} and {c} columns", cols.unwrap_or(0))));
            }
            rows += r;
        }
        let cols = cols.unwrap_or(0);
        let stride = padded_cols(cols, element);
        let memory = Memory::new(driver, rows * stride * element.size(), "weights")?;
        let mut at = 0;
        for part in parts {
            let (r, _) = part.matrix_dims().map_err(|e| CudaError::shape(OP, e.to_string()))?;
            let bytes = encode(part, element, cols, stride);
            driver.upload(memory.address().offset(at * stride * element.size()), &bytes)?;
            at += r;
        }
        Ok(Self { memory: Arc::new(memory), rows, cols, stride, element })
    }

    /// A matrix whose contents are undefined (measurements).
    ///
    /// # Errors
    /// No memory.
    pub fn uninitialised(
        driver: &Arc<dyn Driver>,
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<Self> {
        let stride = padded_cols(cols, element);
        let memory = Memory::new(driver, rows * stride * element.size(), "weights")?;
        Ok(Self { memory: Arc::new(memory), rows, cols, stride, element })
    }

    /// Address of the first element.
    pub fn address(&self) -> DevicePtr {
        self.memory.address()
    }

    /// Bytes of the weight without padding.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.element.size()
    }
}

/// Bytes that a [`Matrix`] of `[rows, cols]` takes, padding included.
pub fn matrix_bytes(rows: usize, cols: usize, element: Element) -> usize {
    rows * padded_cols(cols, element) * element.size()
}

/// A weight vector in f32 (norms, biases: negligible bytes, no rounding).
#[derive(Debug)]
pub struct Vector {
    memory: Memory,
    /// Elements.
    pub len: usize,
}

impl Vector {
    /// Concatenates `parts`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(driver: &Arc<dyn Driver>, parts: &[HostTensor<'_>]) -> Result<Self> {
        let values: Vec<f32> = parts.iter().flat_map(HostTensor::to_f32).collect();
        let memory = Memory::from_bytes(driver, bytemuck::cast_slice(&values), "weights")?;
        Ok(Self { memory, len: values.len() })
    }

    /// Address of the first element.
    pub fn address(&self) -> DevicePtr {
        self.memory.address()
    }
}

/// The experts of a layer that this rank holds: gate and up stacked `[experts, 2 * intermediate, hidden]`, down `[experts, hidden, intermediate]`.
#[derive(Debug)]
pub struct Experts {
    memory: Memory,
    /// Experts.
    pub count: usize,
    /// Columns of an expert.
    pub intermediate: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Elements between rows of gate and up.
    pub gate_up_stride: usize,
    /// Elements between rows of down.
    pub down_stride: usize,
    /// Element type.
    pub element: Element,
}

impl Experts {
    /// Takes memory for `count` experts.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        driver: &Arc<dyn Driver>,
        count: usize,
        intermediate: usize,
        hidden: usize,
        element: Element,
    ) -> Result<Self> {
        let (gate_up_stride, down_stride) =
            (padded_cols(hidden, element), padded_cols(intermediate, element));
        let per_expert = 2 * intermediate * gate_up_stride + hidden * down_stride;
        let memory = Memory::new(driver, count * per_expert * element.size(), "experts")?;
        Ok(Self { memory, count, intermediate, hidden, gate_up_stride, down_stride, element })
    }

    /// Whether there is nothing to compute: no expert, or no column of any.
    pub fn is_empty(&self) -> bool {
        self.count == 0 || self.intermediate == 0
    }

    /// Moves expert `index` to its place.
    ///
    /// # Errors
    /// Shapes that differ from the first expert's, or a failed copy.
    pub fn set(
        &self,
        driver: &Arc<dyn Driver>,
        index: usize,
        gate: &HostTensor<'_>,
        up: &HostTensor<'_>,
        down: &HostTensor<'_>,
    ) -> Result<()> {
        let (i, h) = (self.intermediate, self.hidden);
        if gate.shape() != [i, h] || up.shape() != [i, h] || down.shape() != [h, i] || index >= self.count {
            return Err(CudaError::shape(
                "experts",
                format!(
                    "expert {index}: gate {:?}, up {:?}, down {:?} for {} experts of [{i}, {h}]",
                    gate.shape(),
                    up.shape(),
                    down.shape(),
                    self.count
                ),
            ));
        }
        let size = self.element.size();
        let gate_up = self.gate_up().offset(index * 2 * i * self.gate_up_stride * size);
        driver.upload(gate_up, &encode(gate, self.element, h, self.gate_up_stride))?;
        let up_address = gate_up.offset(i * self.gate_up_stride * size);
        driver.upload(up_address, &encode(up, self.element, h, self.gate_up_stride))?;
        let down_address = self.down().offset(index * h * self.down_stride * size);
        driver.upload(down_address, &encode(down, self.element, i, self.down_stride))
    }

    /// Bytes of all experts; gate and up come first.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// `[experts, 2 * intermediate, gate_up_stride]`: each expert's gate rows, then its up rows.
    pub fn gate_up(&self) -> DevicePtr {
        self.memory.address()
    }

    /// `[experts, hidden, down_stride]`.
    pub fn down(&self) -> DevicePtr {
        self.memory
            .address()
            .offset(self.count * 2 * self.intermediate * self.gate_up_stride * self.element.size())
    }
}

/// A host matrix in the device's element, rows padded with zeros to `stride`.
fn encode<'a>(tensor: &'a HostTensor<'_>, element: Element, cols: usize, stride: usize) -> Cow<'a, [u8]> {
    if stride == cols && element == Element::Bf16 && tensor.dtype() == DType::BF16 {
        return Cow::Borrowed(tensor.bytes());
    }
    let values = tensor.to_f32();
    let mut bytes = Vec::with_capacity(values.len() / cols.max(1) * stride * element.size());
    for row in values.chunks_exact(cols.max(1)) {
        match element {
            Element::F32 => bytes.extend(row.iter().flat_map(|v| v.to_le_bytes())),
            _ => bytes.extend(row.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())),
        }
        bytes.resize(bytes.len() + (stride - cols) * element.size(), 0);
    }
    Cow::Owned(bytes)
}
