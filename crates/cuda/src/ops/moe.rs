//! Mixture of experts (`cuda/moe/`): routing, the experts' grouped products, the weighted sum. Nothing of the routing
//! returns to the host.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::ops::grouped;
use crate::tensor::Tensor;
use crate::weights::Experts;
use crate::{CudaError, Result};

/// Mirror of `longhaul::Routing`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct RoutingParams {
    slot_expert: DevicePtr,
    slot_weight: DevicePtr,
    slot_place: DevicePtr,
    permuted_slot: DevicePtr,
    offsets: DevicePtr,
    rows: u32,
    experts: u32,
    top_k: u32,
    reserved: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RouteParams {
    scores: DevicePtr,
    routing: RoutingParams,
    counts: DevicePtr,
    scores_stride: u32,
    normalise: u32,
    first_expert: u32,
    router_experts: u32,
}

/// Operands of one of the experts' products.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct ExpertsParams {
    pub x: DevicePtr,
    pub weight: DevicePtr,
    pub out: DevicePtr,
    pub routing: RoutingParams,
    pub n: u32,
    pub k: u32,
    pub x_stride: u32,
    pub weight_stride: u32,
    pub out_stride: u32,
    /// Of the mma kernels: 1 where blocks share a tile.
    pub split: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct CombineParams {
    expert_out: DevicePtr,
    shared_out: DevicePtr,
    shared_gate: DevicePtr,
    out: DevicePtr,
    routing: RoutingParams,
    cols: u32,
    expert_stride: u32,
    gate_stride: u32,
    out_stride: u32,
}

const ROUTE: Kernel<RouteParams> = Kernel::new("moe_route");
const ROUTE_CHOOSE: Kernel<RouteParams> = Kernel::new("moe_route_choose");
const ROUTE_SCAN: Kernel<RouteParams> = Kernel::new("moe_route_scan");
const ROUTE_PLACE: Kernel<RouteParams> = Kernel::new("moe_route_place");
const GATE_UP_PLAIN_BF16: Kernel<ExpertsParams> = Kernel::new("moe_gate_up_plain_bf16");
const GATE_UP_PLAIN_F32: Kernel<ExpertsParams> = Kernel::new("moe_gate_up_plain_f32");
const DOWN_PLAIN_BF16: Kernel<ExpertsParams> = Kernel::new("moe_down_plain_bf16");
const DOWN_PLAIN_F32: Kernel<ExpertsParams> = Kernel::new("moe_down_plain_f32");
const COMBINE: Kernel<CombineParams> = Kernel::new("moe_combine");

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[
    ROUTE.info(),
    ROUTE_CHOOSE.info(),
    ROUTE_SCAN.info(),
    ROUTE_PLACE.info(),
    GATE_UP_PLAIN_BF16.info(),
    GATE_UP_PLAIN_F32.info(),
    DOWN_PLAIN_BF16.info(),
    DOWN_PLAIN_F32.info(),
    COMBINE.info(),
];

/// Most experts that the router takes.
const MOST_EXPERTS: usize = 512;
/// Most experts that a row visits.
const MOST_TOP_K: usize = 32;
const ROUTE_THREADS: usize = 1024;
/// Rows that one launch routes; more take three.
const ROUTE_ROWS: usize = 64;
/// Threads of the kernels that take `ROUTE_ROWS` rows a block.
const ROUTE_GROUP_THREADS: u32 = 256;
/// Warps of a block of the plain products, one output element each.
const PLAIN_WARPS: usize = 8;
/// Eight columns each.
const COMBINE_THREADS: u32 = 128;

/// Which experts each row of a step visits, with what weight, and the order that brings an expert's rows together.
pub struct Routing {
    pub(crate) params: RoutingParams,
    /// Rows of the step.
    pub rows: usize,
    /// Experts of this rank.
    pub experts: usize,
    /// Experts of all ranks.
    pub router_experts: usize,
    /// Experts a row visits.
    pub top_k: usize,
    slot_expert: Tensor,
    slot_weight: Tensor,
    arrays: [Tensor; 3],
}

/// In [`Routing::places_to_host`], the place of a slot whose expert another rank holds (`kNowhere` of `cuda/moe/moe.h`).
pub const NOWHERE: u32 = u32::MAX;

impl Routing {
    /// No row visits anything: for [`combine`] on a rank without experts.
    ///
    /// # Errors
    /// No room in the arena.
    pub fn none(ctx: &Context, rows: usize) -> Result<Self> {
        let nothing = || ctx.tensor("route", 1, 0, Element::U32);
        let params = RoutingParams { rows: rows as u32, ..RoutingParams::zeroed() };
        Ok(Routing {
            params,
            rows,
            experts: 0,
            router_experts: 0,
            top_k: 0,
            slot_expert: nothing()?,
            slot_weight: nothing()?,
            arrays: [nothing()?, nothing()?, nothing()?],
        })
    }

    /// (row, choice) pairs.
    pub fn slots(&self) -> usize {
        self.rows * self.top_k
    }

    /// Experts, counted from this rank's first one with wrap-around, and weights of every slot, copied to the host (tests).
    ///
    /// # Errors
    /// The driver's.
    pub fn to_host(&self, ctx: &Context) -> Result<(Vec<u32>, Vec<f32>)> {
        let mut experts = vec![0u8; self.slots() * 4];
        ctx.driver.download(self.slot_expert.address(), &mut experts)?;
        let experts = experts.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok((experts, ctx.tensor_to_f32(&self.slot_weight)?))
    }

    /// The place of every slot, the slot of every place that is taken, and the first place of every expert and behind the last one, copied
    /// to the host (tests).
    ///
    /// # Errors
    /// The driver's.
    pub fn places_to_host(&self, ctx: &Context) -> Result<[Vec<u32>; 3]> {
        let mut out = [Vec::new(), Vec::new(), Vec::new()];
        for (out, array) in out.iter_mut().zip(&self.arrays) {
            out.resize(array.cols, 0);
            ctx.driver.download(array.address(), bytemuck::cast_slice_mut(out))?;
        }
        Ok(out)
    }
}

/// Softmax of `scores` (f32 `[rows, experts]`) over all experts and the `top_k` largest of each row, the lower index on a
/// tie; their weights divided by their sum if `normalise`.
///
/// # Errors
/// Shapes that no kernel takes, or no room in the arena.
pub fn route(ctx: &Context, scores: &Tensor, top_k: usize, normalise: bool) -> Result<Routing> {
    route_to(ctx, scores, top_k, normalise, 0..scores.cols)
}

/// As [`route`] on a rank that holds `experts` only: slots of other experts keep their weight and get no place.
///
/// # Errors
/// As [`route`]; no experts, or some that `scores` do not have.
pub fn route_to(
    ctx: &Context,
    scores: &Tensor,
    top_k: usize,
    normalise: bool,
    experts: Range<usize>,
) -> Result<Routing> {
    const OP: &str = "route";
    let (rows, router_experts) = (scores.rows, scores.cols);
    let held = !experts.is_empty() && experts.end <= router_experts;
    if scores.element != Element::F32 || top_k == 0 || top_k > router_experts || !held {
        return Err(CudaError::shape(
            OP,
            format!(
                "top {top_k} of {:?} scores [{rows}, {router_experts}], experts {experts:?}",
                scores.element
            ),
        ));
    }
    if router_experts > MOST_EXPERTS || top_k > MOST_TOP_K {
        return Err(CudaError::Unsupported(format!(
            "{OP}: top {top_k} of {router_experts} experts; up to {MOST_TOP_K} of {MOST_EXPERTS} are supported"
        )));
    }
    let (first_expert, experts) = (experts.start, experts.len());
    let slots = rows * top_k;
    let slot_expert = ctx.tensor(OP, 1, slots, Element::U32)?;
    let slot_weight = ctx.tensor(OP, 1, slots, Element::F32)?;
    let slot_place = ctx.tensor(OP, 1, slots, Element::U32)?;
    let permuted_slot = ctx.tensor(OP, 1, slots, Element::U32)?;
    let offsets = ctx.tensor(OP, 1, experts + 1, Element::U32)?;
    let params = RoutingParams {
        slot_expert: slot_expert.address(),
        slot_weight: slot_weight.address(),
        slot_place: slot_place.address(),
        permuted_slot: permuted_slot.address(),
        offsets: offsets.address(),
        rows: rows as u32,
        experts: experts as u32,
        top_k: top_k as u32,
        reserved: 0,
    };
    let groups = rows.div_ceil(ROUTE_ROWS);
    let counts = (groups > 1).then(|| ctx.tensor(OP, 1, groups * experts, Element::U32)).transpose()?;
    let route = RouteParams {
        scores: scores.address(),
        routing: params,
        counts: Context::optional(counts.as_ref()),
        scores_stride: scores.stride as u32,
        normalise: normalise.into(),
        first_expert: first_expert as u32,
        router_experts: router_experts as u32,
    };
    if counts.is_some() {
        let by_group = Geometry::linear(groups, ROUTE_GROUP_THREADS);
        ctx.launch(&ROUTE_CHOOSE, by_group, route)?;
        ctx.launch(&ROUTE_SCAN, Geometry::linear(1, experts.next_multiple_of(32) as u32), route)?;
        ctx.launch(&ROUTE_PLACE, by_group, route)?;
    } else {
        let threads = (32 * rows.max(experts)).clamp(128, ROUTE_THREADS) as u32;
        ctx.launch(&ROUTE, Geometry::linear(1, threads), route)?;
    }
    let arrays = [slot_place, permuted_slot, offsets];
    Ok(Routing { params, rows, experts, router_experts, top_k, slot_expert, slot_weight, arrays })
}

/// `down(silu(gate · x) * (up · x))` of every (row, choice) that has a place, ordered by expert: f32 `[slots, hidden]`; what
/// lies behind the last place is undefined.
///
/// # Errors
/// Shapes that do not fit, or no room in the arena.
pub fn experts(ctx: &Context, x: &Tensor, routing: &Routing, experts: &Experts) -> Result<Tensor> {
    const OP: &str = "experts";
    let fits = (x.rows, x.cols, x.element) == (routing.rows, experts.hidden, experts.element);
    if !fits || routing.experts != experts.count {
        return Err(CudaError::shape(
            OP,
            format!(
                "x {:?} [{}, {}], {} rows routed to {} experts, {} experts of {:?} [{}, {}]",
                x.element,
                x.rows,
                x.cols,
                routing.rows,
                routing.experts,
                experts.count,
                experts.element,
                experts.intermediate,
                experts.hidden
            ),
        ));
    }
    let (slots, intermediate, hidden) = (routing.slots(), experts.intermediate, experts.hidden);
    let gated = ctx.tensor(OP, slots, intermediate, x.element)?;
    let out = ctx.tensor(OP, slots, hidden, Element::F32)?;
    if slots == 0 {
        return Ok(out);
    }
    let gate_up = ExpertsParams {
        x: x.address(),
        weight: experts.gate_up(),
        out: gated.address(),
        routing: routing.params,
        n: intermediate as u32,
        k: hidden as u32,
        x_stride: x.stride as u32,
        weight_stride: experts.gate_up_stride as u32,
        out_stride: gated.stride as u32,
        split: 0,
    };
    let down = ExpertsParams {
        x: gated.address(),
        weight: experts.down(),
        out: out.address(),
        n: hidden as u32,
        k: intermediate as u32,
        x_stride: gated.stride as u32,
        weight_stride: experts.down_stride as u32,
        out_stride: out.stride as u32,
        ..gate_up
    };
    if grouped::takes(ctx, experts) {
        grouped::gate_up(ctx, routing, gate_up)?;
        grouped::down(ctx, routing, down)?;
        return Ok(out);
    }
    let (first, second) = match x.element {
        Element::F32 => (GATE_UP_PLAIN_F32, DOWN_PLAIN_F32),
        _ => (GATE_UP_PLAIN_BF16, DOWN_PLAIN_BF16),
    };
    let grid = |n: usize| [slots as u32, n.div_ceil(PLAIN_WARPS) as u32, 1];
    let threads = 32 * PLAIN_WARPS as u32;
    ctx.launch(&first, Geometry::grid(grid(intermediate), threads), gate_up)?;
    ctx.launch(&second, Geometry::grid(grid(hidden), threads), down)?;
    Ok(out)
}

/// Sum of each row's experts on this rank by weight, in slot order, plus `sigmoid(gate) * shared` (`shared` = the shared
/// expert's output and its gate `[rows, 1]`): `[rows, hidden]`. All are f32: the result is added to the residual stream.
///
/// # Errors
/// Shapes that do not fit, or no room in the arena.
pub fn combine(
    ctx: &Context,
    expert_out: &Tensor,
    routing: &Routing,
    shared: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    const OP: &str = "combine";
    let cols = expert_out.cols;
    let shared_fits = shared.is_none_or(|(out, gate)| {
        (out.rows, out.cols, out.element) == (routing.rows, cols, Element::F32)
            && (gate.rows, gate.cols, gate.element) == (routing.rows, 1, Element::F32)
    });
    if expert_out.rows != routing.slots() || expert_out.element != Element::F32 || !shared_fits {
        return Err(CudaError::shape(
            OP,
            format!("experts' output [{}, {cols}] for {} slots", expert_out.rows, routing.slots()),
        ));
    }
    let out = ctx.tensor(OP, routing.rows, cols, Element::F32)?;
    let params = CombineParams {
        expert_out: expert_out.address(),
        shared_out: Context::optional(shared.map(|(out, _)| out)),
        shared_gate: Context::optional(shared.map(|(_, gate)| gate)),
        out: out.address(),
        routing: routing.params,
        cols: cols as u32,
        expert_stride: expert_out.stride as u32,
        gate_stride: shared.map_or(0, |(_, gate)| gate.stride as u32),
        out_stride: out.stride as u32,
    };
    let grid = [routing.rows as u32, (cols as u32).div_ceil(8 * COMBINE_THREADS), 1];
    ctx.launch(&COMBINE, Geometry::grid(grid, COMBINE_THREADS), params)?;
    Ok(out)
}
