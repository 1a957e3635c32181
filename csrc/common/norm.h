// Norms, residual additions before them and gates on these: what the launchers of that family take. Free of
// torch headers. common/norm_cpu.h and common/norm.cuh implement them, common/norm_tensors.h calls them.
//
//   s = x                               Join::kNone
//       x + branch                      Join::kAdd
//       x + tanh(gate) * branch         Join::kGate; x where keep is false
//   s is rounded to dtype, then
//   y = s * rstd * weight               Norm::kRms    rstd = 1 / sqrt(mean(s^2) + eps)
//       (s - mean) * rstd * weight + bias   Norm::kLayer  rstd = 1 / sqrt(mean((s - mean)^2) + eps)
//       nothing                         Norm::kNone
//
// Rows of inputs may lie apart (strides in elements, 0 for a broadcast row); everything else is dense. rows
// and hidden are at least 1. "acc" is float, or double for double.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace megamm {

enum class Norm { kNone, kRms, kLayer };
enum class Join { kNone, kAdd, kGate };

// The gate and the rows it applies to.
struct Gate {
  const void* values;  // [hidden] or [1], before tanh
  const bool* keep;    // [rows]; null: all
  bool per_column;     // whether there is a gate per column
  DType dtype;
};

struct NormForward {
  const void* x;  // [rows, hidden], dtype
  int64_t x_stride;
  const void* branch;  // [rows, hidden], dtype
  int64_t branch_stride;
  Gate gate;
  const void* weight;  // [hidden], weight_dtype
  const void* bias;    // [hidden], weight_dtype
  void* sum;           // [rows, hidden], dtype: s
  void* y;             // [rows, hidden], dtype
  void* mean;          // [rows], acc
  void* rstd;          // [rows], acc
  int64_t rows, hidden;
  double eps;
  DType dtype, weight_dtype;
};

// With Norm::kNone the gradient of s is `grad_sum`; else it is what comes through the norm, plus `grad_sum`
// where that is not null. The gradients of branch and gate are computed from it before it is rounded. An
// output that is null is not wanted (grad_x is, with a norm and a gate, as soon as grad_branch or grad_gate
// is).
struct NormBackward {
  const void* grad;  // [rows, hidden], dtype: of y
  int64_t grad_stride;
  const void* grad_sum;  // [rows, hidden], dtype: of s
  int64_t grad_sum_stride;
  const void* s;  // [rows, hidden], dtype: what was normalised
  int64_t s_stride;
  const void* branch;  // [rows, hidden], dtype; read for grad_gate only
  int64_t branch_stride;
  Gate gate;
  const void* weight;  // [hidden], weight_dtype
  const void* mean;    // [rows], acc
  const void* rstd;    // [rows], acc
  void* grad_x;        // [rows, hidden], dtype: of s, hence of x, and of branch if there is no gate
  void* grad_branch;   // [rows, hidden], dtype
  void* grad_weight;   // [hidden], weight_dtype
  void* grad_bias;     // [hidden], weight_dtype
  void* grad_gate;     // as gate.values
  // Sums over some of the rows each, acc; null with the output that they are for.
  void* weight_partials;  // [partial_rows, hidden]
  void* bias_partials;    // [partial_rows, hidden]
  void* gate_partials;    // [partial_rows, hidden], or [partial_rows] with a single gate
  int64_t rows, hidden;
  int64_t partial_rows;  // from NormKernels::partial_rows
  DType dtype, weight_dtype;
};

// The kernels of one operator on one kind of device. `stream` is a cudaStream_t, or unused. Null, or what
// went wrong. CPU: fp32, fp64, fp16, bf16; weight, bias, gate and their gradients are acc there. CUDA: fp32,
// fp16, bf16; these are fp32 or as x.
struct NormKernels {
  const char* (*forward)(const NormForward& args, void* stream);
  const char* (*backward)(const NormBackward& args, void* stream);
  int64_t (*partial_rows)(const NormBackward& args);  // on the current device
};

}  // namespace megamm
