// Layer norm on the CPU. Math as in kernel.cu.
#include "../common/norm_cpu.h"
#include "layer_norm.h"

namespace megamm {

const NormKernels kLayerNormCpu = norm_kernels_cpu<Norm::kLayer, Join::kNone>();

}  // namespace megamm
