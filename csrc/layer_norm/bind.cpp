// Layer norm: the schemas.
#include <torch/library.h>

#include <tuple>

#include "../common/norm_tensors.h"
#include "layer_norm.h"

namespace megamm {
namespace {

using at::Tensor;

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           double eps) {
  NormInputs inputs{x};
  inputs.weight = weight;
  inputs.bias = bias;
  inputs.eps = eps;
  const NormOutputs out = norm_forward("layer_norm", kKernels, inputs);
  return {out.y, out.mean, out.rstd};
}

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                            const Tensor& mean, const Tensor& rstd, bool need_x,
                                            bool need_weight, bool need_bias) {
  NormGradInputs inputs{grad};
  inputs.s = x;
  inputs.weight = weight;
  inputs.mean = mean;
  inputs.rstd = rstd;
  inputs.need_x = need_x;
  inputs.need_weight = need_weight;
  inputs.need_bias = need_bias;
  const NormGrads out = norm_backward("layer_norm_backward", kKernels, inputs);
  return {out.x, out.weight, out.bias};
}

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool need_x, "
      "bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) {
  m.impl("layer_norm", forward<kLayerNormCpu>);
  m.impl("layer_norm_backward", backward<kLayerNormCpu>);
}

#ifdef MEGAMM_WITH_CUDA
TORCH_LIBRARY_IMPL(megamm, CUDA, m) {
  m.impl("layer_norm", forward<kLayerNormCuda>);
  m.impl("layer_norm_backward", backward<kLayerNormCuda>);
}
#endif

}  // namespace
}  // namespace megamm
