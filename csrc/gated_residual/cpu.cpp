// Tanh-gated residual on the CPU. Math as in kernel.cu.
#include "../common/norm_cpu.h"
#include "gated_residual.h"

namespace megamm {

const NormKernels kGatedResidualCpu = norm_kernels_cpu<Norm::kNone, Join::kGate>();
const NormKernels kGatedResidualRmsNormCpu = norm_kernels_cpu<Norm::kRms, Join::kGate>();
const NormKernels kGatedResidualLayerNormCpu = norm_kernels_cpu<Norm::kLayer, Join::kGate>();

}  // namespace megamm
