// Tanh-gated residual, alone and followed by a norm: the schemas.
#include <torch/library.h>

#include <tuple>

#include "../common/norm_tensors.h"
#include "gated_residual.h"

namespace megamm {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <const NormKernels& kKernels>
Tensor forward(const Tensor& x, const Tensor& branch, const Tensor& gate, const MaybeTensor& keep) {
  return norm_forward("gated_residual", kKernels, {x, branch, gate, keep}).sum;
}

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const MaybeTensor& branch, const Tensor& gate,
                                    const MaybeTensor& keep, bool need_branch, bool need_gate) {
  NormGradInputs inputs;
  inputs.grad_sum = grad;
  inputs.branch = branch;
  inputs.gate = gate;
  inputs.keep = keep;
  inputs.need_branch = need_branch;
  inputs.need_gate = need_gate;
  const NormGrads out = norm_backward("gated_residual_backward", kKernels, inputs);
  return {out.branch, out.gate};
}

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor, Tensor> rms_forward(const Tensor& x, const Tensor& branch, const Tensor& gate,
                                               const MaybeTensor& keep, const Tensor& weight, double eps) {
  const NormOutputs out =
      norm_forward("gated_residual_rms_norm", kKernels, {x, branch, gate, keep, weight, std::nullopt, eps});
  return {out.sum, out.y, out.rstd};
}

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward(const Tensor& x, const Tensor& branch,
                                                         const Tensor& gate, const MaybeTensor& keep,
                                                         const Tensor& weight, const Tensor& bias,
                                                         double eps) {
  const NormOutputs out =
      norm_forward("gated_residual_layer_norm", kKernels, {x, branch, gate, keep, weight, bias, eps});
  return {out.sum, out.y, out.mean, out.rstd};
}

template <const NormKernels& kRms, const NormKernels& kLayer>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward_of(
    const Tensor& grad, const MaybeTensor& grad_sum, const Tensor& sum, const MaybeTensor& branch,
    const Tensor& gate, const MaybeTensor& keep, const Tensor& weight, const MaybeTensor& mean,
    const Tensor& rstd, bool need_x, bool need_branch, bool need_gate, bool need_weight, bool need_bias) {
  NormGradInputs inputs{grad, grad_sum, sum, branch, gate, keep, weight, mean, rstd};
  inputs.need_x = need_x;
  inputs.need_branch = need_branch;
  inputs.need_gate = need_gate;
  inputs.need_weight = need_weight;
  inputs.need_bias = need_bias;
  const NormGrads out = norm_backward("gated_residual_norm_backward", mean ? kLayer : kRms, inputs);
  return {out.x, out.branch, out.gate, out.weight, out.bias};
}

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def("gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor? keep) -> Tensor");
  m.def(
      "gated_residual_backward(Tensor grad, Tensor? branch, Tensor gate, Tensor? keep, bool need_branch, "
      "bool need_gate) -> (Tensor grad_branch, Tensor grad_gate)");
  m.def(
      "gated_residual_rms_norm(Tensor x, Tensor branch, Tensor gate, Tensor? keep, Tensor weight, float eps) "
      "-> (Tensor sum, Tensor y, Tensor rstd)");
  m.def(
      "gated_residual_layer_norm(Tensor x, Tensor branch, Tensor gate, Tensor? keep, Tensor weight, "
      "Tensor bias, float eps) -> (Tensor sum, Tensor y, Tensor mean, Tensor rstd)");
  // With a mean that of the layer norm, without one that of RMSNorm.
  m.def(
      "gated_residual_norm_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor? branch, Tensor gate, "
      "Tensor? keep, Tensor weight, Tensor? mean, Tensor rstd, bool need_x, bool need_branch, "
      "bool need_gate, bool need_weight, bool need_bias) "
      "-> (Tensor grad_x, Tensor grad_branch, Tensor grad_gate, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) {
  m.impl("gated_residual", forward<kGatedResidualCpu>);
  m.impl("gated_residual_backward", backward<kGatedResidualCpu>);
  m.impl("gated_residual_rms_norm", rms_forward<kGatedResidualRmsNormCpu>);
  m.impl("gated_residual_layer_norm", layer_forward<kGatedResidualLayerNormCpu>);
  m.impl("gated_residual_norm_backward",
         norm_backward_of<kGatedResidualRmsNormCpu, kGatedResidualLayerNormCpu>);
}

#ifdef MEGAMM_WITH_CUDA
TORCH_LIBRARY_IMPL(megamm, CUDA, m) {
  m.impl("gated_residual", forward<kGatedResidualCuda>);
  m.impl("gated_residual_backward", backward<kGatedResidualCuda>);
  m.impl("gated_residual_rms_norm", rms_forward<kGatedResidualRmsNormCuda>);
  m.impl("gated_residual_layer_norm", layer_forward<kGatedResidualLayerNormCuda>);
  m.impl("gated_residual_norm_backward",
         norm_backward_of<kGatedResidualRmsNormCuda, kGatedResidualLayerNormCuda>);
}
#endif

}  // namespace
}  // namespace megamm
