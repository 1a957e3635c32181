// SwiGLU: what bind.cpp calls and kernel.cu (CUDA) and cpu.cpp implement. Free of torch headers.
//
// Rows of x and grad may lie apart (strides in elements, 0 for a broadcast row); everything else is dense.
// rows and width are at least 1.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace megamm {

struct SwigluForward {
  const void* x;  // [rows, 2 * width], the gates first, then the values
  int64_t x_stride;
  void* y;  // [rows, width]
  int64_t rows, width;
  DType dtype;
};

struct SwigluBackward {
  const void* grad;  // [rows, width]
  int64_t grad_stride;
  const void* x;  // [rows, 2 * width]
  int64_t x_stride;
  void* grad_x;  // [rows, 2 * width]
  int64_t rows, width;
  DType dtype;
};

// CPU: fp32, fp64, fp16, bf16.
void swiglu_forward_cpu(const SwigluForward& args);
void swiglu_backward_cpu(const SwigluBackward& args);

// CUDA: fp32, fp16, bf16. `stream` is a cudaStream_t. Null, or what went wrong.
const char* swiglu_forward_cuda(const SwigluForward& args, void* stream);
const char* swiglu_backward_cuda(const SwigluBackward& args, void* stream);

}  // namespace megamm
