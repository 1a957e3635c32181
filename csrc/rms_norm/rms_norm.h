// RMSNorm: what bind.cpp calls and kernel.cu (CUDA) and cpu.cpp implement. Free of torch headers.
//
// Rows of x and grad may lie apart (strides in elements, 0 for a broadcast row); everything else is dense.
// rows and hidden are at least 1.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace megamm {

struct RmsNormForward {
  const void* x;  // [rows, hidden], dtype
  int64_t x_stride;
  const void* weight;  // [hidden], weight_dtype
  void* y;             // [rows, hidden], dtype
  void* rstd;          // [rows], float (double for double)
  int64_t rows, hidden;
  double eps;
  DType dtype, weight_dtype;
};

struct RmsNormBackward {
  const void* grad;  // [rows, hidden], dtype
  int64_t grad_stride;
  const void* x;  // [rows, hidden], dtype
  int64_t x_stride;
  const void* weight;  // [hidden], weight_dtype
  const void* rstd;    // [rows], float (double for double)
  void* grad_x;        // [rows, hidden], dtype; null: not wanted
  void* grad_weight;   // [hidden], weight_dtype; null: not wanted
  void* partials;      // [partial_rows, hidden], float (double for double); null with grad_weight
  int64_t rows, hidden;
  int64_t partial_rows;  // from rms_norm_partial_rows_*
  DType dtype, weight_dtype;
};

// CPU: fp32, fp64, fp16, bf16. The weight and its gradient are fp32 there (fp64 for fp64), whatever x is.
void rms_norm_forward_cpu(const RmsNormForward& args);
void rms_norm_backward_cpu(const RmsNormBackward& args);
int64_t rms_norm_partial_rows_cpu(int64_t rows);

// CUDA: fp32, fp16, bf16; the weight is fp32 or as x. `stream` is a cudaStream_t. Null, or what went wrong.
const char* rms_norm_forward_cuda(const RmsNormForward& args, void* stream);
const char* rms_norm_backward_cuda(const RmsNormBackward& args, void* stream);
int64_t rms_norm_partial_rows_cuda(int64_t rows, int64_t hidden, DType dtype);  // on the current device

}  // namespace megamm
