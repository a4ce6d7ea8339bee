//! Weight matrices as the kernels read them: `[out, in]` cut into panels of 16 outputs, in the checkpoint's own dtype.
//!
//! A *unit* is what a panel holds for one output at one step along `in`: a pair of bf16 (neighbours along `in`, the
//! first in the low half: the operand of `vdpbf16ps`), one f16, or one f32. A panel is `[steps][16]` units, outputs
//! fastest, so a step is one contiguous line of 64 (f16: 32) bytes, and a GEMV reads memory strictly in order. Missing
//! outputs of the last panel and the missing half of the last pair are zero. One copy serves every batch size.
use std::fmt;
use std::sync::Arc;

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use longhaul_backend::{DType, Error, HostTensor, Result};
use memmap2::MmapMut;
use rayon::prelude::*;

// Checkpoints are little-endian and packing moves their bytes as they are.
const _: () = assert!(cfg!(target_endian = "little"), "the CPU backend needs a little-endian target");

/// Outputs of one panel.
pub(crate) const PANEL: usize = 16;

/// A weight matrix `[out, in]`, packed. Cloning shares the memory.
#[derive(Clone)]
pub struct Matrix(Arc<Packed>);

struct Packed {
    rows: usize,
    cols: usize,
    dtype: DType,
    /// Page-aligned, zero where nothing was packed.
    data: MmapMut,
}

/// Elements along `in` that one unit holds.
fn elements_per_unit(dtype: DType) -> usize {
    match dtype {
        DType::BF16 => 2,
        DType::F16 | DType::F32 | DType::F8E4M3 => 1,
    }
}

impl Matrix {
    /// Packs `parts`, stacked by rows; a vector counts as one row. Uses the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are no parts, or when the parts differ in width or dtype;
    /// [`Error::UnsupportedDType`] for float8;
    /// [`Error::OutOfMemory`] when the packed copy cannot be had.
    pub fn pack(parts: &[HostTensor<'_>]) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(Error::shape("matrix", "no tensors to stack"));
        };
        if first.dtype() == DType::F8E4M3 {
            return Err(Error::UnsupportedDType { op: "matrix", dtype: first.dtype() });
        }
        let dtype = first.dtype();
        let (_, cols) = first.matrix_dims()?;
        let mut rows = 0;
        for part in parts {
            let (part_rows, part_cols) = part.matrix_dims()?;
            if part_cols != cols || part.dtype() != dtype {
                return Err(Error::shape(
                    "matrix",
                    format!(
                        "cannot stack {} {:?} under {dtype} with {cols} columns: width and dtype must agree",
                        part.dtype(),
                        part.shape()
                    ),
                ));
            }
            rows += part_rows;
        }
        let row_bytes = cols * dtype.size();
        let unit_bytes = elements_per_unit(dtype) * dtype.size();
        let panel_bytes = cols.div_ceil(elements_per_unit(dtype)) * PANEL * unit_bytes;
        let bytes = rows.div_ceil(PANEL) * panel_bytes;
        let mut data = zeroed(bytes).map_err(|_| Error::OutOfMemory {
            what: format!("a {dtype} weight matrix [{rows}, {cols}]"),
            bytes: bytes as u64,
        })?;
        // Row `r` of the stack, as bytes; empty beyond the last row.
        let source = |mut r: usize| {
            for part in parts {
                let part_rows = part.bytes().len() / row_bytes.max(1);
                if r < part_rows {
                    return &part.bytes()[r * row_bytes..][..row_bytes];
                }
                r -= part_rows;
            }
            &[]
        };
        data.par_chunks_mut(panel_bytes.max(1)).enumerate().take(bytes / panel_bytes.max(1)).for_each(
            |(p, panel)| {
                let rows: [&[u8]; PANEL] = std::array::from_fn(|r| source(p * PANEL + r));
                match unit_bytes {
                    4 => interleave::<4>(&rows, cast_slice_mut(panel)),
                    _ => interleave::<2>(&rows, cast_slice_mut(panel)),
                }
            },
        );
        Ok(Self(Arc::new(Packed { rows, cols, dtype, data })))
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.0.cols
    }

    /// Element type in memory.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Bytes in memory, padding included.
    pub fn bytes(&self) -> usize {
        self.0.data.len()
    }

    /// Unpacks row `row` into `out`, widened exactly: the gather of an embedding table.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is no such row or `out` does not hold `cols` values.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let Packed { rows, cols, dtype, .. } = *self.0;
        if row >= rows || out.len() != cols {
            return Err(Error::shape(
                "matrix row",
                format!("row {row} into {} values, but the matrix is [{rows}, {cols}]", out.len()),
            ));
        }
        let panel = self.panel(row / PANEL);
        match dtype {
            DType::BF16 => {
                let units = cast_slice::<u8, [half::bf16; 2]>(panel).iter().skip(row % PANEL).step_by(PANEL);
                for (out, unit) in out.chunks_mut(2).zip(units) {
                    for (out, value) in out.iter_mut().zip(unit) {
                        *out = value.to_f32();
                    }
                }
            }
            DType::F16 => self.unpack(panel, row, out, half::f16::to_f32),
            DType::F32 => self.unpack(panel, row, out, |x: f32| x),
            DType::F8E4M3 => return Err(Error::UnsupportedDType { op: "matrix", dtype }),
        }
        Ok(())
    }

    fn unpack<T: Pod>(&self, panel: &[u8], row: usize, out: &mut [f32], widen: impl Fn(T) -> f32) {
        let units = cast_slice::<u8, T>(panel).iter().skip(row % PANEL).step_by(PANEL);
        for (out, &unit) in out.iter_mut().zip(units) {
            *out = widen(unit);
        }
    }

    /// Steps along `in` of a panel.
    pub(crate) fn steps(&self) -> usize {
        self.cols().div_ceil(elements_per_unit(self.dtype()))
    }

    /// Panels.
    pub(crate) fn panels(&self) -> usize {
        self.rows().div_ceil(PANEL)
    }

    /// The bytes of panel `p`: `[steps][16]` units.
    pub(crate) fn panel(&self, p: usize) -> &[u8] {
        let bytes = self.bytes() / self.panels();
        &self.0.data[p * bytes..][..bytes]
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix({} [{}, {}])", self.dtype(), self.rows(), self.cols())
    }
}

/// Zeroed memory straight from the kernel, in huge pages where it grants them: a GEMV walks a whole model per token,
/// and with 4 KiB pages every 64th line costs a page walk.
fn zeroed(bytes: usize) -> std::io::Result<MmapMut> {
    let data = MmapMut::map_anon(bytes)?;
    #[cfg(target_os = "linux")]
    if bytes >= 2 << 20 {
        // Advice only: without it everything works, more slowly.
        let _ = data.advise(memmap2::Advice::HugePage);
    }
    Ok(data)
}

/// `panel[step][r] = rows[r][step]`, in units of `N` bytes. A row's last unit may be half there.
fn interleave<const N: usize>(rows: &[&[u8]; PANEL], panel: &mut [[u8; N]])
where
    [u8; N]: Pod,
{
    // A block is square, small enough for registers or L1 on both sides, and written in order.
    let (blocks, tail) = panel.as_chunks_mut::<{ PANEL * PANEL }>();
    let square = PANEL * N;
    for (b, block) in blocks.iter_mut().enumerate() {
        let mut values = [[[0; N]; PANEL]; PANEL];
        for (values, row) in values.iter_mut().zip(rows) {
            let row = row.get(b * square..).unwrap_or_default();
            let n = row.len().min(square);
            values.as_flattened_mut()[..n].copy_from_slice(&row[..n]);
        }
        for (step, lanes) in block.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            for (lane, values) in lanes.iter_mut().zip(&values) {
                *lane = values[step];
            }
        }
    }
    let first = blocks.len() * square;
    for (r, row) in rows.iter().enumerate() {
        let units = row.get(first..).unwrap_or_default().chunks(N);
        for (unit, lane) in units.zip(tail.iter_mut().skip(r).step_by(PANEL)) {
            lane[..unit.len()].copy_from_slice(unit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of distinct bit patterns, NaN payloads and subnormals included.
    fn tensor(dtype: DType, rows: usize, cols: usize, salt: u32) -> HostTensor<'static> {
        let bytes = (0..rows * cols * dtype.size())
            .map(|i| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(salt) >> 13) as u8)
            .collect::<Vec<_>>();
        HostTensor::new(dtype, vec![rows, cols], bytes.into()).unwrap()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        // A NaN's payload may be quietened on the way; that it is one is all that counts.
        values.iter().map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() }).collect()
    }

    #[test]
    fn rows_come_back_exactly() {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for cols in [1, 2, 3, 15, 16, 31, 32, 33, 67] {
                for split in [(1, 0), (1, 1), (3, 13), (16, 16), (15, 18), (40, 9)] {
                    let parts = [tensor(dtype, split.0, cols, 1), tensor(dtype, split.1, cols, 2)];
                    let matrix = Matrix::pack(&parts).unwrap();
                    assert_eq!(
                        (matrix.rows(), matrix.cols(), matrix.dtype()),
                        (split.0 + split.1, cols, dtype)
                    );
                    let expected: Vec<f32> = parts.iter().flat_map(|p| p.to_f32()).collect();
                    for r in 0..matrix.rows() {
                        let mut row = vec![f32::NAN; cols];
                        matrix.row_f32(r, &mut row).unwrap();
                        assert_eq!(bits(&row), bits(&expected[r * cols..][..cols]), "{matrix:?} row {r}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_layout_is_pairs_of_inputs_by_sixteen_outputs() {
        let values: Vec<f32> = (0..17 * 3).map(|v| v as f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let matrix =
            Matrix::pack(&[HostTensor::new(DType::BF16, vec![17, 3], bytes.into()).unwrap()]).unwrap();
        assert_eq!(matrix.bytes(), 2 * 2 * 64);
        let at = |p: usize, i: usize| cast_slice::<u8, half::bf16>(matrix.panel(p))[i].to_f32();
        // [step 0][output 5] = elements 0 and 1 of row 5; [step 1] = element 2 and padding.
        assert_eq!([at(0, 10), at(0, 11), at(0, 42), at(0, 43)], [15.0, 16.0, 17.0, 0.0]);
        assert_eq!([at(1, 0), at(1, 1), at(1, 2), at(1, 32)], [48.0, 49.0, 0.0, 50.0]);
    }

    #[test]
    fn what_cannot_be_stacked_is_refused() {
        let bf16 = |rows, cols| tensor(DType::BF16, rows, cols, 0);
        for (parts, expected) in [
            (vec![], "no tensors"),
            (vec![bf16(2, 3), bf16(2, 4)], "with 3 columns"),
            (vec![bf16(2, 3), tensor(DType::F32, 2, 3, 0)], "cannot stack float32"),
        ] {
            let error = Matrix::pack(&parts).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        for (rows, cols) in [(0, 3), (3, 0), (0, 0)] {
            let nothing = Matrix::pack(&[bf16(rows, cols)]).unwrap();
            assert_eq!((nothing.rows(), nothing.cols()), (rows, cols));
        }
        let matrix = Matrix::pack(&[bf16(2, 3)]).unwrap();
        assert!(matrix.row_f32(2, &mut [0.0; 3]).is_err());
        assert!(matrix.row_f32(1, &mut [0.0; 2]).is_err());
    }
}
