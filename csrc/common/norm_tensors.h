// From tensors to the kernels of norm.h: checks, outputs, strides. `op` names the operator in messages.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "norm.h"

namespace megamm {

struct NormInputs {
  at::Tensor x;                      // [..., H]
  std::optional<at::Tensor> branch;  // [..., H]; Join::kAdd, kGate
  std::optional<at::Tensor> gate;    // [1] or [H]; Join::kGate
  std::optional<at::Tensor> keep;    // [...], bool
  std::optional<at::Tensor> weight;  // [H]; Norm::kRms, kLayer
  std::optional<at::Tensor> bias;    // [H]; Norm::kLayer
  double eps = 0;
};

// What the operator does not compute is an undefined tensor.
struct NormOutputs {
  at::Tensor y, sum, mean, rstd;
};

struct NormGradInputs {
  std::optional<at::Tensor> grad;      // of y
  std::optional<at::Tensor> grad_sum;  // of s
  std::optional<at::Tensor> s;         // x, or sum; with a norm
  std::optional<at::Tensor> branch, gate, keep, weight, mean, rstd;
  bool need_x = false, need_branch = false, need_gate = false, need_weight = false, need_bias = false;
};

// An output that is not needed is an empty tensor.
struct NormGrads {
  at::Tensor x, branch, gate, weight, bias;
};

NormOutputs norm_forward(const char* op, const NormKernels& kernels, const NormInputs& inputs);
NormGrads norm_backward(const char* op, const NormKernels& kernels, const NormGradInputs& inputs);

}  // namespace megamm
