//! Safetensors files byte by byte, so that tests can also write wrong ones.

use longhaul_backend::DType;
use serde_json::{Map, Value, json};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyTensor {
    /// Name in the file.
    pub name: String,
    /// Element type in safetensors' spelling, such as `BF16`.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub data: Vec<u8>,
}

impl TinyTensor {
    /// A tensor from values, rounded to `dtype`.
    pub fn new(name: impl Into<String>, dtype: DType, shape: &[usize], values: &[f32]) -> Self {
        let data = match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            DType::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            DType::F8E4M3 => panic!("no weights are stored as {dtype}"),
        };
        Self { name: name.into(), dtype: dtype_name(dtype).to_owned(), shape: shape.to_vec(), data }
    }
}

/// Safetensors' spelling of a dtype.
pub(crate) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::F8E4M3 => "F8_E4M3",
    }
}

/// The bytes of a safetensors file that holds `tensors` in this order.
pub fn encode_safetensors(tensors: &[TinyTensor]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        data.extend_from_slice(&tensor.data);
        let entry =
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    join(&header, &data)
}

/// Applies `edit` to the header of the safetensors file in `bytes` and writes the file anew; the data stays as it was.
///
/// # Panics
/// When `bytes` is not a safetensors file.
pub fn edit_header(bytes: &[u8], edit: impl FnOnce(&mut Map<String, Value>)) -> Vec<u8> {
    let (length, rest) = bytes.split_first_chunk::<8>().expect("a safetensors file has 8 bytes of length");
    let (text, data) =
        rest.split_at(usize::try_from(u64::from_le_bytes(*length)).expect("a header fits memory"));
    let mut header = serde_json::from_slice(text).expect("a safetensors header is a JSON object");
    edit(&mut header);
    join(&header, data)
}

/// Length, header padded with spaces to 8 bytes, data.
pub(crate) fn join(header: &Map<String, Value>, data: &[u8]) -> Vec<u8> {
    let mut text = Value::Object(header.clone()).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&text);
    bytes.extend_from_slice(data);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_crate_reads_what_is_written() {
        let tensors = [
            TinyTensor::new("a", DType::F32, &[2, 2], &[1.0, -2.0, 3.5, 0.0]),
            TinyTensor::new("b", DType::BF16, &[3], &[1.0, 2.0, -0.5]),
        ];
        let bytes = encode_safetensors(&tensors);
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("a").unwrap().shape(), [2, 2]);
        assert_eq!(read.tensor("b").unwrap().data(), tensors[1].data);
        let edited = edit_header(&bytes, |header| {
            header["a"]["shape"] = json!([4]);
        });
        let read = safetensors::SafeTensors::deserialize(&edited).unwrap();
        assert_eq!(read.tensor("a").unwrap().shape(), [4]);
    }
}
