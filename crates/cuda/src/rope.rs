//! Rotation tables on the device (`cuda/common/rope.h`).

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longhaul_backend::RopeTables;

use crate::driver::{DevicePtr, Driver, Memory};
use crate::step::Step;
use crate::{CudaError, Result};

/// Mirror of `longhaul::RopeParams`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct RopeParams {
    /// cos, f32 `[rows, head_dim / 2]`.
    pub cos: DevicePtr,
    /// sin, likewise.
    pub sin: DevicePtr,
    /// Rows of the tables.
    pub rows: u32,
    /// C; 0 = plain positions.
    pub chunk_size: u32,
    /// L; 0 = plain positions.
    pub chunk_len: u32,
    /// Zero.
    pub reserved: u32,
}

/// Tables in device memory, and their host copy for checks.
pub struct Rope {
    /// What kernels take.
    pub params: RopeParams,
    /// Positions in the tables and the chunking.
    pub tables: RopeTables,
    _cos: Memory,
    _sin: Memory,
}

impl Rope {
    /// Copies the tables to the device.
    ///
    /// # Errors
    /// No memory.
    pub fn new(driver: &Arc<dyn Driver>, tables: RopeTables) -> Result<Self> {
        let cos = Memory::from_bytes(driver, bytemuck::cast_slice(&tables.cos), "rotation table (cos)")?;
        let sin = Memory::from_bytes(driver, bytemuck::cast_slice(&tables.sin), "rotation table (sin)")?;
        let params = RopeParams {
            cos: cos.address(),
            sin: sin.address(),
            rows: tables.rows as u32,
            chunk_size: tables.chunking.map_or(0, |c| c.chunk_size),
            chunk_len: tables.chunking.map_or(0, |c| c.len()),
            reserved: 0,
        };
        Ok(Self { params, tables, _cos: cos, _sin: sin })
    }

    /// Checks that the tables are of this head size and reach every position of `step`.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for `op`.
    pub fn check(&self, step: &Step, head_dim: usize, op: &'static str) -> Result<()> {
        if self.tables.half_dim * 2 != head_dim {
            let table_dim = self.tables.half_dim * 2;
            return Err(CudaError::shape(op, format!("rotation of {table_dim} for heads of {head_dim}")));
        }
        let last = step.max_kv_len.saturating_sub(1);
        if self.tables.chunking.is_none() && last >= self.tables.rows {
            let rows = self.tables.rows;
            return Err(CudaError::shape(
                op,
                format!("position {last} is beyond the {rows} rows of the tables"),
            ));
        }
        Ok(())
    }
}
