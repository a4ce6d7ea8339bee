use std::borrow::Cow;
use std::fmt;

use crate::{Error, Result};

/// Element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// FP8 E4M3 without infinities (OCP 8-bit Floating Point Specification): KV caches only.
    F8E4M3,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::F8E4M3 => 1,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::F8E4M3 => "fp8_e4m3",
        })
    }
}

/// A tensor in host memory, row-major, little-endian, on its way from a checkpoint to a device.
#[derive(Debug, Clone)]
pub struct HostTensor<'a> {
    dtype: DType,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl<'a> HostTensor<'a> {
    /// Wraps `data` as a tensor of `shape`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the byte count is not `product(shape) * dtype.size()`.
    pub fn new(dtype: DType, shape: Vec<usize>, data: Cow<'a, [u8]>) -> Result<Self> {
        let bytes = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d));
        if bytes != Some(data.len()) {
            return Err(Error::shape(
                "host tensor",
                format!("{} bytes do not make a {dtype} tensor of shape {shape:?}", data.len()),
            ));
        }
        Ok(Self { dtype, shape, data })
    }

    /// An f32 tensor from values.
    ///
    /// # Errors
    /// As [`HostTensor::new`].
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Result<HostTensor<'static>> {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        HostTensor::new(DType::F32, shape, Cow::Owned(data))
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The raw little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// `[rows, cols]` of a matrix; a vector counts as one row.
    ///
    /// # Errors
    /// [`Error::Shape`] for any other rank.
    pub fn matrix_dims(&self) -> Result<(usize, usize)> {
        match *self.shape.as_slice() {
            [cols] => Ok((1, cols)),
            [rows, cols] => Ok((rows, cols)),
            _ => Err(Error::shape("host tensor", format!("expected a matrix, got shape {:?}", self.shape))),
        }
    }

    /// All elements widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let pairs = || self.data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            DType::F32 => {
                self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            DType::F16 => pairs().map(|b| half::f16::from_bits(b).to_f32()).collect(),
            DType::BF16 => pairs().map(|b| half::bf16::from_bits(b).to_f32()).collect(),
            DType::F8E4M3 => self.data.iter().map(|&b| e4m3_to_f32(b)).collect(),
        }
    }
}

/// Sign, four bits of exponent with bias 7, three of mantissa; all ones but the sign is NaN.
fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match code & 0x7f {
        0x7f => f32::NAN,
        _ if exponent == 0 => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_count_is_refused() {
        let error = HostTensor::new(DType::BF16, vec![2, 3], Cow::Owned(vec![0; 11])).unwrap_err();
        assert!(error.to_string().contains("11 bytes"), "{error}");
        assert!(HostTensor::new(DType::F32, vec![usize::MAX, 8], Cow::Owned(vec![])).is_err());
    }

    #[test]
    fn every_dtype_widens_exactly() {
        let bf16 = half::bf16::from_f32(-1.5).to_le_bytes().to_vec();
        let f16 = half::f16::from_f32(0.25).to_le_bytes().to_vec();
        assert_eq!(HostTensor::new(DType::BF16, vec![1], bf16.into()).unwrap().to_f32(), [-1.5]);
        assert_eq!(HostTensor::new(DType::F16, vec![1], f16.into()).unwrap().to_f32(), [0.25]);
        // 1, the largest, the least subnormal, the least normal, -0.4375.
        let fp8 = HostTensor::new(DType::F8E4M3, vec![5], vec![0x38, 0x7e, 0x01, 0x08, 0xae].into()).unwrap();
        assert_eq!(fp8.to_f32(), [1.0, 448.0, 2f32.powi(-9), 2f32.powi(-6), -0.4375]);
        let nan = HostTensor::new(DType::F8E4M3, vec![1], vec![0x7f].into()).unwrap();
        assert!(nan.to_f32()[0].is_nan());
        assert_eq!(HostTensor::from_f32(vec![1], &[3.25]).unwrap().to_f32(), [3.25]);
    }
}
