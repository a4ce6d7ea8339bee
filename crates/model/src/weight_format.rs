use std::fmt;
use std::ops::Range;

use longhaul_backend::DType;

use crate::{ModelSpec, Role};

/// How the linear weights of a checkpoint are stored. Embedding, head, router, norms and biases stay bfloat16 in the
/// quantised formats, as they do in the published quantised checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightFormat {
    /// Everything in one floating-point type.
    Float(DType),
    /// 8-bit floats with one float32 scale for each block of 128 · 128.
    Fp8,
    /// 4-bit integers with one float16 scale for each group of 128 along the inputs; symmetric.
    Int4,
}

impl WeightFormat {
    /// Rows and columns of a block of [`WeightFormat::Fp8`], columns of a group of [`WeightFormat::Int4`].
    pub const GROUP: usize = 128;

    /// The format with this name, as [`fmt::Display`] writes it.
    pub fn named(name: &str) -> Option<Self> {
        [
            WeightFormat::Float(DType::BF16),
            WeightFormat::Float(DType::F16),
            WeightFormat::Float(DType::F32),
            WeightFormat::Fp8,
            WeightFormat::Int4,
        ]
        .into_iter()
        .find(|format| format.to_string() == name)
    }

    /// Columns that must stay on one rank so that no scale is shared: `None` without scales.
    pub fn quantisation_group(self) -> Option<usize> {
        match self {
            WeightFormat::Float(_) => None,
            WeightFormat::Fp8 | WeightFormat::Int4 => Some(Self::GROUP),
        }
    }

    /// Bytes of the elements `rows` × `cols` of a tensor of `role`; a scale that covers any of them counts. Vectors have one
    /// column.
    pub fn bytes(self, role: Role, rows: &Range<usize>, cols: &Range<usize>) -> u64 {
        let elements = rows.len() as u64 * cols.len() as u64;
        let is_matrix = cols.end > 1;
        let blocks = |range: &Range<usize>| {
            if range.is_empty() {
                return 0;
            }
            (range.end.div_ceil(Self::GROUP) - range.start / Self::GROUP) as u64
        };
        match self {
            WeightFormat::Float(dtype) => elements * dtype.size() as u64,
            _ if !role.is_quantisable() || !is_matrix => elements * DType::BF16.size() as u64,
            WeightFormat::Fp8 => elements + 4 * blocks(rows) * blocks(cols),
            WeightFormat::Int4 => elements.div_ceil(2) + 2 * rows.len() as u64 * blocks(cols),
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightFormat::Float(dtype) => dtype.fmt(f),
            WeightFormat::Fp8 => f.write_str("fp8"),
            WeightFormat::Int4 => f.write_str("int4-g128"),
        }
    }
}

impl ModelSpec {
    /// Bytes of all weights stored as `format`.
    pub fn weight_bytes_as(&self, format: WeightFormat) -> u64 {
        let bytes = |shape: &[usize], role| {
            let (rows, cols) = match *shape {
                [rows, cols] => (rows, cols),
                _ => (shape.iter().product(), 1),
            };
            format.bytes(role, &(0..rows), &(0..cols))
        };
        self.manifest().iter().map(|(tensor, role)| bytes(&tensor.shape, *role)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{family, family_names};

    #[test]
    fn floats_cost_what_the_parameters_say() {
        for name in family_names() {
            let spec = family(name).unwrap().spec;
            for dtype in [DType::BF16, DType::F32] {
                assert_eq!(
                    spec.weight_bytes_as(WeightFormat::Float(dtype)),
                    spec.weight_bytes(dtype),
                    "{name}"
                );
            }
        }
    }

    /// Gigabytes resident as other tools count them: 0.1 GB is what those figures are rounded to.
    #[test]
    fn quantised_sizes_are_the_known_ones() {
        let known = [
            ("qwen2-0.5b", 0.6, 0.5),
            ("qwen2-1.5b", 1.8, 1.1),
            ("qwen2-7b", 8.7, 5.5),
            ("qwen2-57b-a14b", 58.5, 31.2),
            ("qwen2-72b", 75.2, 41.2),
        ];
        for (name, fp8, int4) in known {
            let spec = family(name).unwrap().spec;
            for (format, gigabytes) in [(WeightFormat::Fp8, fp8), (WeightFormat::Int4, int4)] {
                let bytes = spec.weight_bytes_as(format) as f64 / 1e9;
                assert!((bytes - gigabytes).abs() < 0.06, "{name} {format}: {bytes}");
            }
        }
    }

    #[test]
    fn a_scale_on_both_sides_of_a_cut_counts_on_both() {
        let bytes = |format: WeightFormat, rows, cols| format.bytes(Role::Output, &rows, &cols);
        assert_eq!(bytes(WeightFormat::Int4, 0..4, 0..256), 512 + 2 * 4 * 2);
        assert_eq!(bytes(WeightFormat::Int4, 0..4, 64..192), 256 + 2 * 4 * 2);
        assert_eq!(bytes(WeightFormat::Fp8, 0..129, 0..128), 129 * 128 + 4 * 2);
        assert_eq!(bytes(WeightFormat::Fp8, 5..5, 0..128), 0);
        assert_eq!(WeightFormat::Int4.bytes(Role::Query, &(0..128), &(0..1)), 256, "a bias stays bfloat16");
    }

    #[test]
    fn names_lead_back() {
        for name in ["bfloat16", "float32", "fp8", "int4-g128"] {
            assert_eq!(WeightFormat::named(name).unwrap().to_string(), name);
        }
        assert_eq!(WeightFormat::named("int3"), None);
    }
}
