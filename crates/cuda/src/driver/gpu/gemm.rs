//! Dense products by cuBLASLt.
//!
//! Row-major `out[m, n] = x[m, k] · weight[n, k]ᵀ` is, to a library that counts columns first, `outᵀ[n, m] = weightᵀᵀ · xᵀ`:
//! the weight transposed times x as it is, the layout it is fastest in. How a shape is computed is chosen once and kept, so
//! equal calls give equal bits, and a choice never falls into a timed or recorded step twice.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasLtMatmulDescAttributes_t as Desc, cublasLtMatmulPreferenceAttributes_t as Pref,
};

use super::context::Stream;
use super::libraries;
use crate::driver::{DevicePtr, Element, Gemm};
use crate::{CudaError, Result};

/// What cuBLASLt may use beside the operands: its recommendation for Hopper; others need less.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// CUBLAS_OP_T
const TRANSPOSED: i32 = 1;
/// Kept choices. Every prefill length is a shape of its own.
const MOST_PLANS: usize = 1 << 13;

/// The library and what it has chosen so far.
pub(super) struct Products {
    stream: Arc<Stream>,
    handle: sys::cublasLtHandle_t,
    workspace: DevicePtr,
    plans: HashMap<Key, Plan>,
}

// SAFETY: a handle may move between threads that bind its context; calls are made under a lock.
unsafe impl Send for Products {}

/// What a choice depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    m: usize,
    n: usize,
    k: usize,
    x_stride: usize,
    weight_stride: usize,
    out_stride: usize,
    element: Element,
    out_element: Element,
    bias: Bias,
    /// Of weight, x and out, bytes.
    alignment: [u32; 3],
}

/// Where the bias is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Bias {
    /// There is none.
    None,
    /// By the library, in f32.
    Epilogue,
    /// It is in the output already, and the product is added to it.
    InOutput,
}

impl Bias {
    /// How `gemm`'s bias is added. The library's epilogue takes a bias of the output's type only, and ours is f32.
    pub fn of(gemm: &Gemm) -> Bias {
        match (gemm.bias, gemm.out_element) {
            (DevicePtr::NULL, _) => Bias::None,
            (_, Element::F32) => Bias::Epilogue,
            _ => Bias::InOutput,
        }
    }
}

impl Key {
    fn new(gemm: &Gemm) -> Self {
        Self {
            m: gemm.m,
            n: gemm.n,
            k: gemm.k,
            x_stride: gemm.x_stride,
            weight_stride: gemm.weight_stride,
            out_stride: gemm.out_stride,
            element: gemm.element,
            out_element: gemm.out_element,
            bias: Bias::of(gemm),
            alignment: [gemm.weight, gemm.x, gemm.out].map(alignment),
        }
    }
}

/// Alignment of an address as far as the library cares.
fn alignment(address: DevicePtr) -> u32 {
    1 << address.0.trailing_zeros().min(8)
}

/// The descriptors of a product and the algorithm chosen for it.
struct Plan {
    desc: Matmul,
    weight: Layout,
    x: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
}

struct Matmul(sys::cublasLtMatmulDesc_t);
struct Layout(sys::cublasLtMatrixLayout_t);
struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Matmul {
    fn drop(&mut self) {
        // SAFETY: created with the value, destroyed once.
        let _ = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}

impl Matmul {
    fn set<T>(&self, attribute: Desc, value: &T) -> std::result::Result<(), CublasError> {
        // SAFETY: the library copies `size_of::<T>()` bytes from a live value.
        unsafe {
            let value: *const T = value;
            lt::set_matmul_desc_attribute(self.0, attribute, value.cast(), size_of::<T>())
        }
    }
}

impl Preference {
    fn set<T>(&self, attribute: Pref, value: &T) -> std::result::Result<(), CublasError> {
        // SAFETY: as in `Matmul::set`.
        unsafe {
            let value: *const T = value;
            lt::set_matmul_pref_attribute(self.0, attribute, value.cast(), size_of::<T>())
        }
    }
}

impl Products {
    /// Starts the library. The context is current; `workspace` holds [`WORKSPACE_BYTES`] as long as this value lives.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`]: no library, or one that does not start.
    pub fn new(stream: &Arc<Stream>, workspace: DevicePtr) -> Result<Self> {
        libraries::load_cublaslt()?;
        let handle = lt::create_handle().map_err(|error| CudaError::Unavailable {
            message: format!(
                "cuBLASLt does not start ({error}): it and the NVIDIA driver may not fit together; install cuBLAS 13 and driver \
                 branch R580 or newer, or use --device cpu"
            ),
        })?;
        Ok(Self { stream: stream.clone(), handle, workspace, plans: HashMap::new() })
    }

    /// Queues the product. With [`Bias::InOutput`], the output holds the bias. The context is current.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] for elements or shapes the library has no product of; [`CudaError::Call`] for operands it refuses.
    pub fn run(&mut self, gemm: &Gemm) -> Result<()> {
        let key = Key::new(gemm);
        let failed = |error: CublasError| CudaError::Call {
            call: format!("cuBLASLt product of [{}, {}] and [{}, {}]", gemm.m, gemm.k, gemm.n, gemm.k),
            message: format!("{error} ({gemm:?})"),
        };
        if !self.plans.contains_key(&key) {
            if self.plans.len() == MOST_PLANS {
                self.plans.clear();
            }
            let plan = Plan::choose(self.handle, &key)?.map_err(|error| match error {
                CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED) => {
                    CudaError::Unsupported(format!("cuBLASLt has no algorithm for {gemm:?}"))
                }
                other => failed(other),
            })?;
            self.plans.insert(key, plan);
        }
        let Some(plan) = self.plans.get(&key) else { return Ok(()) };
        if key.bias == Bias::Epilogue {
            plan.desc.set(Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &gemm.bias.0).map_err(failed)?;
        }
        let (alpha, beta) = (1f32, if key.bias == Bias::InOutput { 1f32 } else { 0f32 });
        let (alpha, beta): (*const f32, *const f32) = (&alpha, &beta);
        let at = |address: DevicePtr| address.0 as *mut c_void;
        // SAFETY: descriptors and handle live; the caller owns the operands that they describe, and the workspace is
        // `WORKSPACE_BYTES`; scalars are read before the call returns.
        unsafe {
            lt::matmul(
                self.handle,
                plan.desc.0,
                alpha.cast(),
                beta.cast(),
                at(gemm.weight),
                plan.weight.0,
                at(gemm.x),
                plan.x.0,
                at(gemm.out),
                plan.out.0,
                at(gemm.out),
                plan.out.0,
                &plan.algorithm,
                at(self.workspace),
                plan.workspace_bytes,
                self.stream.raw().cast(),
            )
        }
        .map_err(failed)
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        let _ = self.stream.bind();
        self.plans.clear();
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

impl Plan {
    fn choose(handle: sys::cublasLtHandle_t, key: &Key) -> Result<std::result::Result<Plan, CublasError>> {
        let element = data_type(key.element, key)?;
        let out_element = data_type(key.out_element, key)?;
        Ok(Self::choose_of(handle, key, element, out_element))
    }

    fn choose_of(
        handle: sys::cublasLtHandle_t,
        key: &Key,
        element: sys::cudaDataType,
        out_element: sys::cudaDataType,
    ) -> std::result::Result<Plan, CublasError> {
        // The debugging mode multiplies in float32 proper: no TF32, no emulation.
        let compute = match key.element {
            Element::F32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_PEDANTIC,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let desc = Matmul(lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?);
        desc.set(Desc::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if key.bias == Bias::Epilogue {
            desc.set(Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            desc.set(Desc::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &sys::cudaDataType::CUDA_R_32F)?;
        }
        let layout = |kind, rows: usize, cols: usize, stride: usize| {
            lt::create_matrix_layout(kind, rows as u64, cols as u64, stride as i64).map(Layout)
        };
        let weight = layout(element, key.k, key.n, key.weight_stride)?;
        let x = layout(element, key.k, key.m, key.x_stride)?;
        let out = layout(out_element, key.n, key.m, key.out_stride)?;

        let preference = Preference(lt::create_matmul_pref()?);
        preference.set(Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        // Partial sums are added in f32, in a fixed order, or there are none.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Pref::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        let [of_weight, of_x, of_out] = key.alignment;
        preference.set(Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &of_weight)?;
        preference.set(Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &of_x)?;
        preference.set(Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &of_out)?;
        preference.set(Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &of_out)?;
        // SAFETY: all descriptors live.
        let choice = unsafe {
            lt::get_matmul_algo_heuristic(handle, desc.0, weight.0, x.0, out.0, out.0, preference.0)
        }?;
        Ok(Plan { desc, weight, x, out, algorithm: choice.algo, workspace_bytes: choice.workspaceSize })
    }
}

fn data_type(element: Element, key: &Key) -> Result<sys::cudaDataType> {
    match element {
        Element::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        Element::Bf16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        _ => Err(CudaError::Unsupported(format!("gemm of {:?} to {:?}", key.element, key.out_element))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_is_what_the_address_has() {
        for (address, expected) in [(0x1000, 256), (0x1010, 16), (0x1002, 2), (0x10_0080, 128), (0, 256)] {
            assert_eq!(alignment(DevicePtr(address)), expected);
        }
    }

    #[test]
    fn a_bias_of_another_type_goes_through_the_output() {
        let gemm = |bias, out_element| Gemm {
            x: DevicePtr(256),
            x_stride: 8,
            weight: DevicePtr(512),
            weight_stride: 8,
            bias,
            out: DevicePtr(1024),
            out_stride: 8,
            m: 8,
            n: 8,
            k: 8,
            element: Element::Bf16,
            out_element,
        };
        assert_eq!(Bias::of(&gemm(DevicePtr::NULL, Element::Bf16)), Bias::None);
        assert_eq!(Bias::of(&gemm(DevicePtr(64), Element::Bf16)), Bias::InOutput);
        assert_eq!(Bias::of(&gemm(DevicePtr(64), Element::F32)), Bias::Epilogue);
    }
}
