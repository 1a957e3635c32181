// Layer norm: what bind.cpp calls and kernel.cu and cpu.cpp implement. Free of torch headers.
#pragma once

#include "../common/norm.h"

namespace megamm {

extern const NormKernels kLayerNormCpu, kLayerNormCuda;

}  // namespace megamm
