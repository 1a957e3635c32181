// Tanh-gated residual, alone and followed by a norm: what bind.cpp calls and kernel.cu and cpu.cpp implement.
// Free of torch headers.
#pragma once

#include "../common/norm.h"

namespace megamm {

extern const NormKernels kGatedResidualCpu, kGatedResidualRmsNormCpu, kGatedResidualLayerNormCpu;
extern const NormKernels kGatedResidualCuda, kGatedResidualRmsNormCuda, kGatedResidualLayerNormCuda;

}  // namespace megamm
