//! Mixture of experts against float64.

mod common;

use common::{Random, context, relative_error, schedules};
use longhaul_backend::HostTensor;
use longhaul_cuda::driver::{Element, EmulatedOptions};
use longhaul_cuda::ops::moe::{NOWHERE, combine, experts, route, route_to};
use longhaul_cuda::weights::Experts;
use longhaul_cuda::{Context, CudaError, Variant};

/// Softmax over all experts and the k largest, the lower index on a tie, in float64.
fn reference_route(scores: &[f32], k: usize, normalise: bool) -> (Vec<u32>, Vec<f64>) {
    let largest = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
    let weights: Vec<f64> = scores.iter().map(|s| f64::from(s - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(k);
    let chosen: f64 = order.iter().map(|&e| weights[e]).sum();
    let divisor = if normalise { chosen } else { sum };
    (order.iter().map(|&e| e as u32).collect(), order.iter().map(|&e| weights[e] / divisor).collect())
}

/// Scores whose softmax tells experts apart in f32, of a kind.
fn scores(rows: usize, count: usize, kind: &str) -> Vec<f32> {
    let mut random = Random((rows * 1000 + count) as u64);
    (0..rows * count)
        .map(|i| match kind {
            "random" => 3.0 * random.value(),
            "equal" => 0.25,
            // Everything goes to the last experts.
            "one" => (i % count) as f32,
            // Half of the experts get nothing.
            "even" => {
                if (i % count).is_multiple_of(2) {
                    4.0 + random.value()
                } else {
                    random.value()
                }
            }
            _ => unreachable!(),
        })
        .collect()
}

#[test]
fn routing_matches_float64() {
    for (index, options) in schedules().into_iter().enumerate() {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        for (count, k) in [(1, 1), (4, 2), (16, 4), (60, 4), (64, 8), (512, 32)] {
            // Up to 64 rows are one launch; 321 are six groups.
            for rows in [1, 2, 64, 65, if count == 512 { 66 } else { 321 }] {
                let kind = ["random", "equal", "one"][(index + rows) % 3];
                let values = scores(rows, count, kind);
                let tensor = ctx.tensor_from_f32(&values, rows, count, Element::F32).unwrap();
                let normalise = rows % 2 == 0;
                let routing = route(&ctx, &tensor, k, normalise).unwrap();
                let (chosen, weights) = routing.to_host(&ctx).unwrap();
                let (mut ids, mut exact) = (Vec::new(), Vec::new());
                for row in values.chunks_exact(count) {
                    let (i, w) = reference_route(row, k, normalise);
                    ids.extend(i);
                    exact.extend(w);
                }
                assert_eq!(chosen, ids, "{kind}, {rows} rows, top {k} of {count}");
                assert!(relative_error(&weights, &exact) < 1e-5);
                // By expert, then row, then choice.
                let mut by_place: Vec<usize> = (0..ids.len()).collect();
                by_place.sort_by_key(|&slot| ids[slot]);
                let [places, slots, offsets] = routing.places_to_host(&ctx).unwrap();
                assert!(
                    slots.iter().map(|&slot| slot as usize).eq(by_place.iter().copied()),
                    "{kind}, {rows}"
                );
                assert!(by_place.iter().enumerate().all(|(place, &slot)| places[slot] as usize == place));
                let first = |expert: usize| ids.iter().filter(|&&id| (id as usize) < expert).count();
                assert!(offsets.iter().enumerate().all(|(expert, &place)| place as usize == first(expert)));
            }
        }
    }
}

/// Experts dealt whole: each rank gives its own slots places, in the order they have among all, and the others none.
#[test]
fn routing_on_a_rank_places_its_own_slots() {
    for options in schedules().into_iter().step_by(2) {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        for (rows, count, k) in [(1, 5, 3), (7, 60, 4), (130, 64, 8)] {
            let values = scores(rows, count, "random");
            let tensor = ctx.tensor_from_f32(&values, rows, count, Element::F32).unwrap();
            let whole = route(&ctx, &tensor, k, true).unwrap();
            let (chosen, weights) = whole.to_host(&ctx).unwrap();
            for held in [0..count / 2, count / 2..count - 1, count - 1..count] {
                let routing = route_to(&ctx, &tensor, k, true, held.clone()).unwrap();
                let (local, same) = routing.to_host(&ctx).unwrap();
                assert_eq!(same, weights, "all ranks weigh alike");
                let [places, slots, offsets] = routing.places_to_host(&ctx).unwrap();
                let mut ours: Vec<usize> =
                    (0..chosen.len()).filter(|&slot| held.contains(&(chosen[slot] as usize))).collect();
                ours.sort_by_key(|&slot| chosen[slot]);
                assert_eq!(offsets.len(), held.len() + 1);
                assert_eq!(offsets[held.len()] as usize, ours.len());
                assert!(slots.iter().zip(&ours).all(|(&slot, &ours)| slot as usize == ours), "{held:?}");
                for slot in 0..chosen.len() {
                    assert_eq!(local[slot], chosen[slot].wrapping_sub(held.start as u32));
                    let place = ours.iter().position(|&ours| ours == slot).map_or(NOWHERE, |p| p as u32);
                    assert_eq!(places[slot], place, "slot {slot} of {held:?}");
                }
            }
            assert!(route_to(&ctx, &tensor, k, true, 1..count + 1).is_err());
            assert!(route_to(&ctx, &tensor, k, true, 1..1).is_err());
        }
    }
}

struct Layer {
    weights: Experts,
    gate: Vec<Vec<f32>>,
    up: Vec<Vec<f32>>,
    down: Vec<Vec<f32>>,
}

fn layer(ctx: &Context, count: usize, intermediate: usize, hidden: usize) -> Layer {
    let mut random = Random((count + intermediate + hidden) as u64);
    let weights = Experts::new(&ctx.driver, count, intermediate, hidden, ctx.element).unwrap();
    let (mut gate, mut up, mut down) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..count {
        let mut matrix = || random.exact(intermediate * hidden, ctx.element);
        let (g, u, d) = (matrix(), matrix(), matrix());
        let host = |v: &[f32], rows, cols| HostTensor::from_f32(vec![rows, cols], v).unwrap();
        weights
            .set(
                &ctx.driver,
                index,
                &host(&g, intermediate, hidden),
                &host(&u, intermediate, hidden),
                &host(&d, hidden, intermediate),
            )
            .unwrap();
        gate.push(g);
        up.push(u);
        down.push(d);
    }
    Layer { weights, gate, up, down }
}

fn multiply(x: &[f64], weight: &[f32]) -> Vec<f64> {
    weight.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

/// One row through its experts and the shared one, in float64.
fn reference(
    layer: &Layer,
    x: &[f32],
    routed: &(Vec<u32>, Vec<f64>),
    shared: Option<(&[f32], f32)>,
) -> Vec<f64> {
    let x64: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    let mut out = vec![0.0; x.len()];
    for (expert, weight) in routed.0.iter().zip(&routed.1) {
        let e = *expert as usize;
        let (gate, up) = (multiply(&x64, &layer.gate[e]), multiply(&x64, &layer.up[e]));
        let gated: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        for (o, v) in out.iter_mut().zip(multiply(&gated, &layer.down[e])) {
            *o += weight * v;
        }
    }
    if let Some((values, gate)) = shared {
        for (o, v) in out.iter_mut().zip(values) {
            *o += f64::from(*v) / (1.0 + (-f64::from(gate)).exp());
        }
    }
    out
}

#[derive(Clone, Copy)]
struct Shape {
    count: usize,
    k: usize,
    intermediate: usize,
    hidden: usize,
    rows: usize,
    kind: &'static str,
}

fn check(ctx: &Context, s: Shape) {
    let layer = layer(ctx, s.count, s.intermediate, s.hidden);
    let mut random = Random(s.rows as u64);
    let x = random.exact(s.rows * s.hidden, ctx.element);
    let shared = random.values(s.rows * s.hidden);
    let gates = random.values(s.rows);
    let values = scores(s.rows, s.count, s.kind);
    let device_scores = ctx.tensor_from_f32(&values, s.rows, s.count, Element::F32).unwrap();
    let device_x = ctx.tensor_from_f32(&x, s.rows, s.hidden, ctx.element).unwrap();
    let device_shared = ctx.tensor_from_f32(&shared, s.rows, s.hidden, Element::F32).unwrap();
    let device_gates = ctx.tensor_from_f32(&gates, s.rows, 1, Element::F32).unwrap();
    let routing = route(ctx, &device_scores, s.k, false).unwrap();
    let routed = experts(ctx, &device_x, &routing, &layer.weights).unwrap();
    let with_shared = s.rows.is_multiple_of(2);
    let operand = with_shared.then_some((&device_shared, &device_gates));
    let out = ctx.tensor_to_f32(&combine(ctx, &routed, &routing, operand).unwrap()).unwrap();
    for row in 0..s.rows {
        let span = row * s.hidden..(row + 1) * s.hidden;
        let chosen = reference_route(&values[row * s.count..][..s.count], s.k, false);
        let shared = with_shared.then_some((&shared[span.clone()], gates[row]));
        let exact = reference(&layer, &x[span.clone()], &chosen, shared);
        let error = relative_error(&out[span], &exact);
        // bf16: the gated products are rounded between the two matrices.
        let tolerance = if ctx.element == Element::F32 { 1e-5 } else { 2e-2 };
        assert!(error <= tolerance, "row {row} of {} ({}), {} experts: {error}", s.rows, s.kind, s.count);
    }
}

const SHAPES: [Shape; 11] = [
    Shape { count: 1, k: 1, intermediate: 8, hidden: 8, rows: 3, kind: "random" },
    Shape { count: 4, k: 2, intermediate: 40, hidden: 72, rows: 1, kind: "random" },
    Shape { count: 16, k: 4, intermediate: 33, hidden: 24, rows: 33, kind: "random" },
    Shape { count: 64, k: 8, intermediate: 16, hidden: 130, rows: 8, kind: "random" },
    // Most experts have no row, a few have all.
    Shape { count: 60, k: 4, intermediate: 24, hidden: 40, rows: 65, kind: "one" },
    Shape { count: 2, k: 1, intermediate: 72, hidden: 64, rows: 130, kind: "equal" },
    // One expert takes all: more rows than its tile has.
    Shape { count: 16, k: 1, intermediate: 24, hidden: 72, rows: 33, kind: "one" },
    Shape { count: 5, k: 1, intermediate: 33, hidden: 40, rows: 65, kind: "one" },
    // Tiles of 16, 32, 64 and 128 rows.
    Shape { count: 8, k: 3, intermediate: 65, hidden: 96, rows: 33, kind: "even" },
    Shape { count: 4, k: 2, intermediate: 40, hidden: 130, rows: 65, kind: "even" },
    Shape { count: 3, k: 2, intermediate: 66, hidden: 131, rows: 200, kind: "random" },
];

/// k so long that it is summed in parts, in both products.
const LONG: [Shape; 2] = [
    Shape { count: 3, k: 2, intermediate: 648, hidden: 700, rows: 1, kind: "random" },
    Shape { count: 2, k: 2, intermediate: 650, hidden: 712, rows: 9, kind: "random" },
];

#[test]
fn plain_experts_match_float64() {
    for element in [Element::Bf16, Element::F32] {
        let ctx = context(EmulatedOptions::default(), Variant::Plain, element);
        SHAPES.into_iter().for_each(|s| check(&ctx, s));
    }
}

#[test]
fn mma_experts_match_float64_under_every_schedule() {
    for options in schedules() {
        for multiprocessors in [1, 3] {
            let ctx = context(EmulatedOptions { multiprocessors, ..options }, Variant::Auto, Element::Bf16);
            SHAPES.into_iter().for_each(|s| check(&ctx, s));
        }
    }
}

/// 2 multiprocessors have too many tiles to share them, 64 too few not to.
#[test]
fn parts_of_k_match_float64() {
    for (options, multiprocessors) in schedules().into_iter().zip([2, 64].into_iter().cycle()) {
        let ctx = context(EmulatedOptions { multiprocessors, ..options }, Variant::Auto, Element::Bf16);
        LONG.into_iter().for_each(|s| check(&ctx, s));
    }
}

/// A row's result has the same bits alone and among others, whatever tile of up to 64 rows its expert's rows fill, and
/// whether blocks share its tiles.
#[test]
fn a_row_does_not_depend_on_the_batch() {
    for (count, intermediate, hidden) in [(4, 40, 72), (3, 24, 650)] {
        let mut first: Option<Vec<f32>> = None;
        for (options, multiprocessors) in schedules().into_iter().zip([8, 1].into_iter().cycle()) {
            let ctx = context(EmulatedOptions { multiprocessors, ..options }, Variant::Auto, Element::Bf16);
            let layer = layer(&ctx, count, intermediate, hidden);
            let x = Random(9).exact(90 * hidden, Element::Bf16);
            let values = scores(90, count, "random");
            for rows in [1, 2, 20, 33, 90] {
                let s = ctx.tensor_from_f32(&values[..rows * count], rows, count, Element::F32).unwrap();
                let x = ctx.tensor_from_f32(&x[..rows * hidden], rows, hidden, Element::Bf16).unwrap();
                let routing = route(&ctx, &s, 2, true).unwrap();
                let routed = experts(&ctx, &x, &routing, &layer.weights).unwrap();
                let out = combine(&ctx, &routed, &routing, None).unwrap();
                let row = ctx.tensor_to_f32(&out).unwrap()[..hidden].to_vec();
                assert!(*first.get_or_insert_with(|| row.clone()) == row, "{rows} rows, {options:?}");
            }
        }
    }
}

/// The same beyond: in tiles of 128 rows.
#[test]
fn a_row_among_many_does_not_depend_on_the_others() {
    let (count, intermediate, hidden) = (2, 40, 72);
    let mut first: Option<Vec<f32>> = None;
    for options in schedules() {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        let layer = layer(&ctx, count, intermediate, hidden);
        let x = Random(9).exact(150 * hidden, Element::Bf16);
        let values = scores(150, count, "random");
        for (from, rows) in [(0, 150), (3, 100)] {
            let s = &values[from * count..][..rows * count];
            let s = ctx.tensor_from_f32(s, rows, count, Element::F32).unwrap();
            let x = &x[from * hidden..][..rows * hidden];
            let x = ctx.tensor_from_f32(x, rows, hidden, Element::Bf16).unwrap();
            let routing = route(&ctx, &s, 2, true).unwrap();
            let routed = experts(&ctx, &x, &routing, &layer.weights).unwrap();
            let out = combine(&ctx, &routed, &routing, None).unwrap();
            let row = ctx.tensor_to_f32(&out).unwrap()[(5 - from) * hidden..][..hidden].to_vec();
            assert!(*first.get_or_insert_with(|| row.clone()) == row, "row 5 from {from}, {options:?}");
        }
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let s = ctx.tensor_from_f32(&[0.0; 12], 3, 4, Element::F32).unwrap();
    assert!(matches!(route(&ctx, &s, 5, false), Err(CudaError::Shape { .. })));
    assert!(matches!(route(&ctx, &s, 0, false), Err(CudaError::Shape { .. })));
    let wide = ctx.tensor_from_f32(&[0.0; 600], 1, 600, Element::F32).unwrap();
    assert!(matches!(route(&ctx, &wide, 2, false), Err(CudaError::Unsupported(_))));
    let routing = route(&ctx, &s, 2, false).unwrap();
    let layer = layer(&ctx, 4, 8, 16);
    let narrow = ctx.tensor_from_f32(&[0.0; 24], 3, 8, Element::Bf16).unwrap();
    assert!(matches!(experts(&ctx, &narrow, &routing, &layer.weights), Err(CudaError::Shape { .. })));
    assert!(matches!(combine(&ctx, &narrow, &routing, None), Err(CudaError::Shape { .. })));
}
