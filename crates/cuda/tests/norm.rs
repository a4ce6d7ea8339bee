//! Residual add and RMSNorm against float64.

mod common;

use std::borrow::Cow;

use common::{Random, context, relative_error, schedules, tolerance};
use longhaul_backend::HostTensor;
use longhaul_cuda::Variant;
use longhaul_cuda::driver::Element;
use longhaul_cuda::ops::norm::add_rms_norm;
use longhaul_cuda::weights::Vector;

fn reference(x: &[f32], residual: Option<&[f32]>, weight: &[f32], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let cols = weight.len();
    let sum: Vec<f64> =
        (0..x.len()).map(|i| f64::from(x[i]) + residual.map_or(0.0, |r| f64::from(r[i]))).collect();
    let normed = sum.chunks_exact(cols).flat_map(|row| {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / cols as f64;
        let factor = (mean + eps).sqrt().recip();
        row.iter().zip(weight).map(move |(v, w)| v * factor * f64::from(*w)).collect::<Vec<_>>()
    });
    (normed.collect(), sum)
}

#[test]
fn matches_float64_over_shapes_and_schedules() {
    for (from, element) in
        [(Element::Bf16, Element::Bf16), (Element::F32, Element::Bf16), (Element::F32, Element::F32)]
    {
        for options in schedules() {
            let ctx = context(options, Variant::Plain, element);
            for (rows, cols) in
                [(1, 1), (1, 7), (3, 256), (2, 257), (5, 896), (1, 3584), (2, 8192), (1, 8195), (2, 12_297)]
            {
                let mut random = Random(rows as u64 * 1000 + cols as u64);
                let (x, residual) = (random.exact(rows * cols, from), random.values(rows * cols));
                let weight = random.values(cols);
                let bytes: Vec<u8> = weight.iter().flat_map(|v| v.to_le_bytes()).collect();
                let host =
                    HostTensor::new(longhaul_backend::DType::F32, vec![cols], Cow::Owned(bytes)).unwrap();
                let vector = Vector::new(&ctx.driver, &[host]).unwrap();
                let dx = ctx.tensor_from_f32(&x, rows, cols, from).unwrap();
                for with_residual in [false, true] {
                    let device = with_residual
                        .then(|| ctx.tensor_from_f32(&residual, rows, cols, Element::F32).unwrap());
                    let (normed, sum) = add_rms_norm(&ctx, &dx, device.as_ref(), &vector, 1e-6).unwrap();
                    let (exact, exact_sum) =
                        reference(&x, with_residual.then_some(&residual[..]), &weight, 1e-6);
                    let error = relative_error(&ctx.tensor_to_f32(&normed).unwrap(), &exact);
                    assert!(error <= tolerance(element), "[{rows}, {cols}] {element:?}: {error}");
                    let error = relative_error(&ctx.tensor_to_f32(&sum).unwrap(), &exact_sum);
                    assert!(error <= tolerance(Element::F32), "residual [{rows}, {cols}]: {error}");
                }
            }
        }
    }
}
