// Tanh-gated residual for CUDA, alone and followed by a norm: sm_80 (A100) and sm_90a (H100, H200).
//
// Math: common/norm.h and common/norm.cuh.
//
// Bytes moved, for e bytes per element and T = rows * hidden:
//   alone, forward    3 T e   x and branch read, the sum written
//   alone, backward   3 T e   its gradient and the branch read, grad_branch written (grad_x is the gradient)
//   norm, forward     4 T e   x and branch read, sum and y written (apart: 5 T e)
//   norm, backward    6 T e   sum, branch and both gradients read, two written (apart: 9 T e)
// plus 4 or 8 bytes per row with a norm and what the partial sums take, which does not grow with the rows.
// The branch of a row that is not kept is not read.
//
// Versions: common/norm.cuh. Rows up to 16 KiB are held in registers in the backward with a norm (2 packets,
// 512 threads). Not timed on a GPU so far; compiled for both targets by the tests.
#include "../common/norm.cuh"
#include "gated_residual.h"

namespace megamm {

const NormKernels kGatedResidualCuda = norm_kernels_cuda<Norm::kNone, Join::kGate>();
const NormKernels kGatedResidualRmsNormCuda = norm_kernels_cuda<Norm::kRms, Join::kGate>();
const NormKernels kGatedResidualLayerNormCuda = norm_kernels_cuda<Norm::kLayer, Join::kGate>();

}  // namespace megamm
