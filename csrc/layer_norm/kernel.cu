// Layer norm for CUDA: sm_80 (A100) and sm_90a (H100, H200).
//
// Math: common/norm.h and common/norm.cuh.
//
// Bytes moved, for e bytes per element and T = rows * hidden:
//   forward    2 T e + 8 rows   x read; y, mean and rstd written
//   backward   3 T e + 8 rows   x and grad read, grad_x written
// The variance is that of the differences from the mean, which are in registers: a second sum over threads,
// no second read. The partial gradients of weight and bias add 16 * partial_rows * hidden, which does not
// grow with the rows.
//
// Versions: common/norm.cuh. 16-bit rows up to 8192 wide are held in registers in the backward (16384 for
// RMSNorm): there are two sums per column. Not timed on a GPU so far; compiled for both targets by the tests.
#include "../common/norm.cuh"
#include "layer_norm.h"

namespace megamm {

const NormKernels kLayerNormCuda = norm_kernels_cuda<Norm::kLayer, Join::kNone>();

}  // namespace megamm
