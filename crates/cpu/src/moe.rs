//! The mixture-of-experts block: fp32 softmax over all experts, then top-k, experts in ascending order, shared expert
//! behind a sigmoid gate (the order of operations of the published implementation).

use longhaul_backend::{Error, MoeWeights, Result};

use crate::backend::Cpu;
use crate::linear::{Gemm, Precision};
use crate::matrix::Matrix;

/// One expert on the CPU.
#[derive(Debug)]
pub struct Expert {
    /// `[2 * intermediate, hidden]`: gate rows, then up rows.
    pub(crate) gate_up: Matrix,
    /// `[hidden, intermediate]`.
    pub(crate) down: Matrix,
}

/// Experts and weights of every row: softmax over all logits, the `top_k` largest (the lower index wins a tie), divided by
/// their sum if `normalise`. Ascending by expert.
pub(crate) fn route(logits: &[f32], experts: usize, top_k: usize, normalise: bool) -> Vec<Vec<(usize, f32)>> {
    logits
        .chunks_exact(experts)
        .map(|row| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exp: Vec<f32> = row.iter().map(|x| (x - max).exp()).collect();
            let sum: f32 = exp.iter().sum();
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| exp[b].total_cmp(&exp[a]).then(a.cmp(&b)));
            let mut chosen: Vec<(usize, f32)> =
                order.into_iter().take(top_k).map(|e| (e, exp[e] / sum)).collect();
            if normalise {
                let total: f32 = chosen.iter().map(|(_, w)| w).sum();
                chosen.iter_mut().for_each(|(_, w)| *w /= total);
            }
            chosen.sort_by_key(|&(expert, _)| expert);
            chosen
        })
        .collect()
}

/// `x` is `[rows, hidden]`, as is the result.
pub(crate) fn moe(gemm: Gemm, x: &[f32], rows: usize, weights: &MoeWeights<Cpu>) -> Result<Vec<f32>> {
    let hidden = weights.router.cols();
    let experts = weights.router.rows();
    let ours = weights.first_expert..weights.first_expert + weights.experts.len();
    if x.len() != rows * hidden || ours.end > experts || weights.top_k > experts {
        return Err(Error::shape(
            "moe",
            format!(
                "{} values for {rows} rows of {hidden}, experts {ours:?} of {experts} router rows, top {}",
                x.len(),
                weights.top_k
            ),
        ));
    }
    // The router decides which weights are read: always in full precision.
    let router = Gemm { precision: Precision::F32, ..gemm };
    let mut logits = vec![0.0; rows * experts];
    router.linear(x, rows, &weights.router, None, &mut logits)?;
    let routes = route(&logits, experts, weights.top_k, weights.norm_topk_prob);

    let mut out = vec![0.0; rows * hidden];
    for (index, expert) in ours.zip(&weights.experts) {
        if expert.gate_up.rows() == 0 {
            // Its columns are other ranks'.
            continue;
        }
        let visitors: Vec<(usize, f32)> = routes
            .iter()
            .enumerate()
            .filter_map(|(row, route)| route.iter().find(|(e, _)| *e == index).map(|(_, w)| (row, *w)))
            .collect();
        if visitors.is_empty() {
            continue;
        }
        let gathered: Vec<f32> =
            visitors.iter().flat_map(|&(row, _)| &x[row * hidden..][..hidden]).copied().collect();
        let y = swiglu(gemm, &gathered, visitors.len(), &expert.gate_up, &expert.down)?;
        for (&(row, weight), y) in visitors.iter().zip(y.chunks_exact(hidden)) {
            for (o, y) in out[row * hidden..][..hidden].iter_mut().zip(y) {
                *o += weight * y;
            }
        }
    }
    if let Some(shared) = &weights.shared {
        let mut gates = vec![0.0; rows];
        router.linear(x, rows, &shared.gate, None, &mut gates)?;
        let y = swiglu(gemm, x, rows, &shared.gate_up, &shared.down)?;
        for ((o, y), gate) in out.chunks_exact_mut(hidden).zip(y.chunks_exact(hidden)).zip(gates) {
            let weight = 1.0 / (1.0 + (-gate).exp());
            for (o, y) in o.iter_mut().zip(y) {
                *o += weight * y;
            }
        }
    }
    Ok(out)
}

fn swiglu(gemm: Gemm, x: &[f32], rows: usize, gate_up: &Matrix, down: &Matrix) -> Result<Vec<f32>> {
    let mut activated = vec![0.0; rows * gate_up.rows() / 2];
    gemm.linear_silu_mul(x, rows, gate_up, &mut activated)?;
    let mut y = vec![0.0; rows * down.rows()];
    gemm.linear(&activated, rows, down, None, &mut y)?;
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routing_is_softmax_then_top_k() {
        let logits = [1.0f32, 3.0, 2.0, 3.0];
        let z: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let routes = route(&logits, 4, 3, false);
        let experts: Vec<usize> = routes[0].iter().map(|r| r.0).collect();
        assert_eq!(experts, [1, 2, 3]);
        for &(e, w) in &routes[0] {
            assert!((f64::from(w) - f64::from(logits[e]).exp() / z).abs() < 1e-6);
        }
        let sum: f32 = route(&logits, 4, 3, true)[0].iter().map(|r| r.1).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        // A tie goes to the lower index.
        assert_eq!(route(&logits, 4, 1, false)[0][0].0, 1);
    }
}
