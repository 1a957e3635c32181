// RMSNorm, alone and behind a residual addition: the schemas.
#include <torch/library.h>

#include <tuple>

#include "../common/norm_tensors.h"
#include "rms_norm.h"

namespace megamm {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, double eps) {
  NormInputs inputs{x};
  inputs.weight = weight;
  inputs.eps = eps;
  const NormOutputs out = norm_forward("rms_norm", kKernels, inputs);
  return {out.y, out.rstd};
}

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                    const Tensor& rstd, bool need_x, bool need_weight) {
  NormGradInputs inputs{grad};
  inputs.s = x;
  inputs.weight = weight;
  inputs.rstd = rstd;
  inputs.need_x = need_x;
  inputs.need_weight = need_weight;
  const NormGrads out = norm_backward("rms_norm_backward", kKernels, inputs);
  return {out.x, out.weight};
}

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                               double eps) {
  NormInputs inputs{x, residual};
  inputs.weight = weight;
  inputs.eps = eps;
  const NormOutputs out = norm_forward("rms_norm_add", kKernels, inputs);
  return {out.y, out.sum, out.rstd};
}

template <const NormKernels& kKernels>
std::tuple<Tensor, Tensor> add_backward(const Tensor& grad, const MaybeTensor& grad_sum, const Tensor& sum,
                                        const Tensor& weight, const Tensor& rstd, bool need_sum,
                                        bool need_weight) {
  NormGradInputs inputs{grad, grad_sum};
  inputs.s = sum;
  inputs.weight = weight;
  inputs.rstd = rstd;
  inputs.need_x = need_sum;
  inputs.need_weight = need_weight;
  const NormGrads out = norm_backward("rms_norm_add_backward", kKernels, inputs);
  return {out.x, out.weight};
}

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, bool need_x, bool need_weight) "
      "-> (Tensor grad_x, Tensor grad_weight)");
  m.def(
      "rms_norm_add(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum, Tensor "
      "rstd)");
  m.def(
      "rms_norm_add_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor rstd, "
      "bool need_sum, bool need_weight) -> (Tensor grad_sum, Tensor grad_weight)");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) {
  m.impl("rms_norm", forward<kRmsNormCpu>);
  m.impl("rms_norm_backward", backward<kRmsNormCpu>);
  m.impl("rms_norm_add", add_forward<kRmsNormAddCpu>);
  m.impl("rms_norm_add_backward", add_backward<kRmsNormAddCpu>);
}

#ifdef MEGAMM_WITH_CUDA
TORCH_LIBRARY_IMPL(megamm, CUDA, m) {
  m.impl("rms_norm", forward<kRmsNormCuda>);
  m.impl("rms_norm_backward", backward<kRmsNormCuda>);
  m.impl("rms_norm_add", add_forward<kRmsNormAddCuda>);
  m.impl("rms_norm_add_backward", add_backward<kRmsNormAddCuda>);
}
#endif

}  // namespace
}  // namespace megamm
