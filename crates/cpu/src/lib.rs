//! The CPU backend: candle-core tensors as activations, our own kernels where they pay.
//!
//! It is the reference for every other device and the default where there is no GPU. Activations are f32; weights stay in
//! the checkpoint's dtype (candle widens a bf16 weight on every matmul, so the linear op is ours). Every op gives a row
//! the same bits whatever batch, chunk or thread count it runs in, so chunked prefill equals prefill in one go exactly.
//!
//! Invariant: `unsafe` lives in the SIMD modules ([`simd`], [`linear`], the attention kernel, packing) and nowhere else.
#![deny(unsafe_code)]

mod attention;
mod backend;
mod elementwise;
mod exchanger;
mod kv;
pub mod linear;
pub mod matrix;
mod moe;
mod sampling;
pub mod simd;
mod tensor;

pub use backend::{Cpu, CpuError};
pub use kv::KvCache;
pub use linear::Precision;
