// SwiGLU: schema, argument checks and the way from tensors to the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "../common/tensor.h"
#include "swiglu.h"
#ifdef MEGAMM_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace megamm {
namespace {

using at::Tensor;

// The shape of y: that of x with half the last dimension.
std::vector<int64_t> output_shape(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, "megamm::swiglu: x is ", x.sizes(),
              ", expected an even last dimension (gates, then values)");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() /= 2;
  return shape;
}

// Allocates the output; launch(arguments) fills it.
template <typename Launch>
Tensor forward(const Tensor& x, const Launch& launch) {
  const Tensor y = at::empty(output_shape(x), x.options());
  if (x.numel() == 0) return y;
  const Tensor rows = as_rows(x);
  SwigluForward args{};
  args.x = rows.const_data_ptr();
  args.x_stride = row_stride(rows);
  args.y = y.mutable_data_ptr();
  args.rows = rows.size(0);
  args.width = rows.size(1) / 2;
  args.dtype = dtype_of(rows);
  launch(args);
  return y;
}

template <typename Launch>
Tensor backward(const Tensor& grad, const Tensor& x, const Launch& launch) {
  const std::vector<int64_t> shape = output_shape(x);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef(shape), "megamm::swiglu_backward: grad is ", grad.sizes(),
              ", expected ", at::IntArrayRef(shape));
  TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "megamm::swiglu_backward: grad is ", grad.scalar_type(),
              ", x is ", x.scalar_type());
  TORCH_CHECK(grad.device() == x.device(), "megamm::swiglu_backward: x is on ", x.device(), ", grad on ",
              grad.device());
  const Tensor grad_x = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return grad_x;
  const Tensor x_rows = as_rows(x), grad_rows = as_rows(grad);
  SwigluBackward args{};
  args.grad = grad_rows.const_data_ptr();
  args.grad_stride = row_stride(grad_rows);
  args.x = x_rows.const_data_ptr();
  args.x_stride = row_stride(x_rows);
  args.grad_x = grad_x.mutable_data_ptr();
  args.rows = grad_rows.size(0);
  args.width = grad_rows.size(1);
  args.dtype = dtype_of(x_rows);
  launch(args);
  return grad_x;
}

Tensor forward_cpu(const Tensor& x) { return forward(x, swiglu_forward_cpu); }

Tensor backward_cpu(const Tensor& grad, const Tensor& x) { return backward(grad, x, swiglu_backward_cpu); }

#ifdef MEGAMM_WITH_CUDA
void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "megamm::swiglu: ", error); }

Tensor forward_cuda(const Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  return forward(x, [](const SwigluForward& args) {
    check_launch(swiglu_forward_cuda(args, c10::cuda::getCurrentCUDAStream().stream()));
  });
}

Tensor backward_cuda(const Tensor& grad, const Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  return backward(grad, x, [](const SwigluBackward& args) {
    check_launch(swiglu_backward_cuda(args, c10::cuda::getCurrentCUDAStream().stream()));
  });
}
#endif

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) {
  m.impl("swiglu", forward_cpu);
  m.impl("swiglu_backward", backward_cpu);
}

#ifdef MEGAMM_WITH_CUDA
TORCH_LIBRARY_IMPL(megamm, CUDA, m) {
  m.impl("swiglu", forward_cuda);
  m.impl("swiglu_backward", backward_cuda);
}
#endif

}  // namespace
}  // namespace megamm
