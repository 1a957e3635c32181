// RMSNorm: schema, argument checks and the way from tensors to the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../common/tensor.h"
#include "rms_norm.h"
#ifdef MEGAMM_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace megamm {
namespace {

using at::Tensor;
using TwoTensors = std::tuple<Tensor, Tensor>;

void check_inputs(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1, "megamm::rms_norm: x has no dimension");
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), "megamm::rms_norm: weight is ",
              weight.sizes(), ", the last dimension of x is ", x.size(-1));
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat,
              "megamm::rms_norm: weight is ", weight.scalar_type(), ", expected that of x (", x.scalar_type(),
              ") or float");
  TORCH_CHECK(weight.device() == x.device(), "megamm::rms_norm: x is on ", x.device(), ", weight on ",
              weight.device());
}

// Allocates the outputs; launch(arguments) fills them. `weight` is in the dtype that the kernels take.
template <typename Launch>
TwoTensors forward(const Tensor& x, const Tensor& weight, double eps, const Launch& launch) {
  const Tensor y = at::empty(x.sizes(), x.options());
  const Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(accumulation_type(x)));
  if (x.numel() == 0) {
    rstd.zero_();
    return {y, rstd};
  }
  const Tensor rows = as_rows(x), dense_weight = weight.contiguous();
  RmsNormForward args{};
  args.x = rows.const_data_ptr();
  args.x_stride = row_stride(rows);
  args.weight = dense_weight.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  args.rows = rows.size(0);
  args.hidden = rows.size(1);
  args.eps = eps;
  args.dtype = dtype_of(rows);
  args.weight_dtype = dtype_of(dense_weight);
  launch(args);
  return {y, rstd};
}

// As forward(); an output that is not needed is an empty tensor.
template <typename PartialRows, typename Launch>
TwoTensors backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                    bool need_x, bool need_weight, const PartialRows& partial_rows, const Launch& launch) {
  TORCH_CHECK(grad.sizes() == x.sizes(), "megamm::rms_norm_backward: grad is ", grad.sizes(), ", x is ",
              x.sizes());
  TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "megamm::rms_norm_backward: grad is ",
              grad.scalar_type(), ", x is ", x.scalar_type());
  TORCH_CHECK(rstd.numel() * x.size(-1) == x.numel() && rstd.scalar_type() == accumulation_type(x),
              "megamm::rms_norm_backward: rstd is not what the forward returned");
  const Tensor grad_x = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const Tensor grad_weight = at::empty({need_weight ? weight.size(0) : 0}, weight.options());
  if (x.numel() == 0) {
    grad_weight.zero_();
    return {grad_x, grad_weight};
  }
  if (!need_x && !need_weight) return {grad_x, grad_weight};
  const Tensor x_rows = as_rows(x), grad_rows = as_rows(grad);
  const Tensor dense_weight = weight.contiguous(), dense_rstd = rstd.contiguous();
  RmsNormBackward args{};
  args.grad = grad_rows.const_data_ptr();
  args.grad_stride = row_stride(grad_rows);
  args.x = x_rows.const_data_ptr();
  args.x_stride = row_stride(x_rows);
  args.weight = dense_weight.const_data_ptr();
  args.rstd = dense_rstd.const_data_ptr();
  args.rows = x_rows.size(0);
  args.hidden = x_rows.size(1);
  args.dtype = dtype_of(x_rows);
  args.weight_dtype = dtype_of(dense_weight);
  args.partial_rows = partial_rows(args);
  if (need_x) args.grad_x = grad_x.mutable_data_ptr();
  Tensor partials;
  if (need_weight) {
    partials = at::empty({args.partial_rows, args.hidden}, rstd.options());
    args.grad_weight = grad_weight.mutable_data_ptr();
    args.partials = partials.mutable_data_ptr();
  }
  launch(args);
  return {grad_x, grad_weight};
}

TwoTensors forward_cpu(const Tensor& x, const Tensor& weight, double eps) {
  check_inputs(x, weight);
  return forward(x, weight.to(accumulation_type(x)), eps, rms_norm_forward_cpu);
}

TwoTensors backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                        bool need_x, bool need_weight) {
  check_inputs(x, weight);
  const auto partial_rows = [](const RmsNormBackward& args) { return rms_norm_partial_rows_cpu(args.rows); };
  auto [grad_x, grad_weight] = backward(grad, x, weight.to(accumulation_type(x)), rstd, need_x, need_weight,
                                        partial_rows, rms_norm_backward_cpu);
  return {grad_x, grad_weight.to(weight.scalar_type())};
}

#ifdef MEGAMM_WITH_CUDA
void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "megamm::rms_norm: ", error); }

TwoTensors forward_cuda(const Tensor& x, const Tensor& weight, double eps) {
  check_inputs(x, weight);
  const c10::cuda::CUDAGuard guard(x.device());
  return forward(x, weight, eps, [](const RmsNormForward& args) {
    check_launch(rms_norm_forward_cuda(args, c10::cuda::getCurrentCUDAStream().stream()));
  });
}

TwoTensors backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                         bool need_x, bool need_weight) {
  check_inputs(x, weight);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto partial_rows = [](const RmsNormBackward& args) {
    return rms_norm_partial_rows_cuda(args.rows, args.hidden, args.dtype);
  };
  return backward(grad, x, weight, rstd, need_x, need_weight, partial_rows, [](const RmsNormBackward& args) {
    check_launch(rms_norm_backward_cuda(args, c10::cuda::getCurrentCUDAStream().stream()));
  });
}
#endif

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, bool need_x, bool need_weight) "
      "-> (Tensor grad_x, Tensor grad_weight)");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) {
  m.impl("rms_norm", forward_cpu);
  m.impl("rms_norm_backward", backward_cpu);
}

#ifdef MEGAMM_WITH_CUDA
TORCH_LIBRARY_IMPL(megamm, CUDA, m) {
  m.impl("rms_norm", forward_cuda);
  m.impl("rms_norm_backward", backward_cuda);
}
#endif

}  // namespace
}  // namespace megamm
