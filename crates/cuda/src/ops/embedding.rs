//! Embedding gather and the gather of logit rows (`cuda/embedding/`).

use bytemuck::{Pod, Zeroable};

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Geometry};
use crate::step::Step;
use crate::tensor::Tensor;
use crate::weights::Matrix;
use crate::{CudaError, Result};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct EmbedParams {
    step: DevicePtr,
    table: DevicePtr,
    out: DevicePtr,
    table_rows: u32,
    row_units: u32,
    first_id: u32,
    vocab_size: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GatherParams {
    step: DevicePtr,
    x: DevicePtr,
    out: DevicePtr,
    row_units: u32,
    reserved: u32,
}

const EMBED: Kernel<EmbedParams> = Kernel::new("embed_gather");
const GATHER: Kernel<GatherParams> = Kernel::new("gather_logit_rows");
const THREADS: u32 = 128;

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[EMBED.info(), GATHER.info()];

/// Rows of `table` (`[vocab, hidden]`) for the step's ids: `[rows, hidden]`.
///
/// # Errors
/// An id outside the table, or no room in the arena.
pub fn embed(ctx: &Context, table: &Matrix, step: &Step) -> Result<Tensor> {
    embed_slice(ctx, table, 0, table.rows, step)
}

/// As [`embed`] from a table of the ids from `first_id` on, out of a vocabulary of `vocab_size`: other ids give zeros.
///
/// # Errors
/// A table or an id outside the vocabulary, or no room in the arena.
pub fn embed_slice(
    ctx: &Context,
    table: &Matrix,
    first_id: usize,
    vocab_size: usize,
    step: &Step,
) -> Result<Tensor> {
    const OP: &str = "embed";
    if first_id + table.rows > vocab_size {
        let rows = table.rows;
        return Err(CudaError::shape(OP, format!("{rows} rows from id {first_id} on of {vocab_size} ids")));
    }
    if let Some(id) = step.inputs.ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(CudaError::shape(
            OP,
            format!("token id {id} is outside the vocabulary of {vocab_size} ids"),
        ));
    }
    let out = ctx.tensor(OP, step.rows(), table.cols, table.element)?;
    let params = EmbedParams {
        step: step.address(),
        table: table.address(),
        out: out.address(),
        table_rows: table.rows as u32,
        row_units: (table.stride * table.element.size() / 16) as u32,
        first_id: first_id as u32,
        vocab_size: vocab_size as u32,
    };
    ctx.launch(&EMBED, Geometry::linear(step.rows(), THREADS), params)?;
    Ok(out)
}

/// The rows of `x` whose logits the step wants: `[logit_rows, cols]`.
///
/// # Errors
/// Fewer rows than the step has, or no room in the arena.
pub fn gather_logit_rows(ctx: &Context, x: &Tensor, step: &Step) -> Result<Tensor> {
    const OP: &str = "logit_rows";
    if x.rows < step.rows() {
        return Err(CudaError::shape(OP, format!("{} rows for a step of {}", x.rows, step.rows())));
    }
    let out = ctx.tensor(OP, step.logit_rows(), x.cols, x.element)?;
    if step.logit_rows() == 0 {
        return Ok(out);
    }
    let params = GatherParams {
        step: step.address(),
        x: x.address(),
        out: out.address(),
        row_units: (x.stride * x.element.size() / 16) as u32,
        reserved: 0,
    };
    ctx.launch(&GATHER, Geometry::linear(step.logit_rows(), THREADS), params)?;
    Ok(out)
}
