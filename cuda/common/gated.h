// SiLU(gate) * up.
#pragma once

#include "element.h"

namespace longhaul {

// One element of the gated activation. As the unfused kernels do, both products are rounded to bf16 first.
__device__ __forceinline__ float gated(float gate, float up) {
    gate = to_float(from_float<Bf16>(gate));
    return gate / (1.0f + expf(-gate)) * to_float(from_float<Bf16>(up));
}

}  // namespace longhaul
