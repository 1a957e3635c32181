// RMSNorm for CUDA, alone and behind a residual addition: sm_80 (A100) and sm_90a (H100, H200).
//
// Math: common/norm.h and common/norm.cuh.
//
// Bytes moved, for e bytes per element and T = rows * hidden:
//   forward         2 T e + 4 rows   x read, y and rstd written
//   backward        3 T e + 4 rows   x and grad read, grad_x written
//   add, forward    4 T e + 4 rows   x and residual read, sum and y written (apart: 5 T e)
//   add, backward   4 T e + 4 rows   sum and both gradients read, one written (apart: 6 T e)
// The partial weight gradients add 8 * partial_rows * hidden, which does not grow with the rows.
//
// Versions: common/norm.cuh. Not timed on a GPU so far; compiled for both targets by the tests.
#include "../common/norm.cuh"
#include "rms_norm.h"

namespace megamm {

const NormKernels kRmsNormCuda = norm_kernels_cuda<Norm::kRms, Join::kNone>();
const NormKernels kRmsNormAddCuda = norm_kernels_cuda<Norm::kRms, Join::kAdd>();

}  // namespace megamm
