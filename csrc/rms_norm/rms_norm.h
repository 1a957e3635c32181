// RMSNorm, alone and behind a residual addition: what bind.cpp calls and kernel.cu and cpu.cpp implement.
// Free of torch headers.
#pragma once

#include "../common/norm.h"

namespace megamm {

extern const NormKernels kRmsNormCpu, kRmsNormAddCpu;
extern const NormKernels kRmsNormCuda, kRmsNormAddCuda;

}  // namespace megamm
