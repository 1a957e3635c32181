// RMSNorm on the CPU. Math as in kernel.cu.
#include "../common/norm_cpu.h"
#include "rms_norm.h"

namespace megamm {

const NormKernels kRmsNormCpu = norm_kernels_cpu<Norm::kRms, Join::kNone>();
const NormKernels kRmsNormAddCpu = norm_kernels_cpu<Norm::kRms, Join::kAdd>();

}  // namespace megamm
