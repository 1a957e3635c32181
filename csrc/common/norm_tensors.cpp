// Norms and gated residuals: argument checks, and the way from tensors to the kernels, for all operators.
#include "norm_tensors.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "tensor.h"
#ifdef MEGAMM_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace megamm {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

void* current_stream([[maybe_unused]] const Tensor& x) {
#ifdef MEGAMM_WITH_CUDA
  if (x.is_cuda()) return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
#endif
  return nullptr;
}

void check_launch(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, "megamm::", op, ": ", error);
}

// A tensor of the shape, dtype and device of x.
void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK(tensor.sizes() == x.sizes(), "megamm::", op, ": ", name, " is ", tensor.sizes(), ", expected ",
              x.sizes());
  TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "megamm::", op, ": ", name, " is ",
              tensor.scalar_type(), ", expected ", x.scalar_type());
  TORCH_CHECK(tensor.device() == x.device(), "megamm::", op, ": ", name, " is on ", tensor.device(),
              ", expected ", x.device());
}

// Weight, bias or gate.
void check_parameter(const char* op, const char* name, const Tensor& tensor, const Tensor& x, bool or_one) {
  TORCH_CHECK(tensor.dim() == 1 && (tensor.size(0) == x.size(-1) || (or_one && tensor.size(0) == 1)),
              "megamm::", op, ": ", name, " is ", tensor.sizes(), ", the last dimension of x is ",
              x.size(-1));
  TORCH_CHECK(tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == at::kFloat, "megamm::", op,
              ": ", name, " is ", tensor.scalar_type(), ", expected that of x (", x.scalar_type(),
              ") or float");
  TORCH_CHECK(tensor.device() == x.device(), "megamm::", op, ": ", name, " is on ", tensor.device(),
              ", expected ", x.device());
}

void check_parameters(const char* op, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                      const MaybeTensor& gate, const MaybeTensor& keep) {
  TORCH_CHECK(x.dim() >= 1, "megamm::", op, ": x has no dimension");
  if (weight) check_parameter(op, "weight", *weight, x, false);
  if (bias) {
    check_parameter(op, "bias", *bias, x, false);
    TORCH_CHECK(bias->scalar_type() == weight->scalar_type(), "megamm::", op, ": bias is ",
                bias->scalar_type(), ", weight is ", weight->scalar_type());
  }
  if (gate) check_parameter(op, "gate", *gate, x, true);
  if (keep) {
    TORCH_CHECK(keep->scalar_type() == at::kBool && keep->sizes() == x.sizes().slice(0, x.dim() - 1) &&
                    keep->device() == x.device(),
                "megamm::", op, ": keep is ", keep->scalar_type(), " ", keep->sizes(),
                ", expected Bool for every row of x");
  }
}

// What a kernel reads a parameter as: dense, and on the CPU in the type that it computes in.
Tensor as_parameter(const Tensor& tensor, const Tensor& x) {
  return (x.is_cpu() ? tensor.to(accumulation_type(x)) : tensor).contiguous();
}

// The tensors that a Gate points into.
struct GateTensors {
  Tensor values, keep;
};

Gate make_gate(const MaybeTensor& gate, const MaybeTensor& keep, const Tensor& x, GateTensors& held) {
  Gate result{};
  if (!gate) return result;
  held.values = as_parameter(*gate, x);
  result.values = held.values.const_data_ptr();
  result.per_column = gate->size(0) != 1;
  result.dtype = dtype_of(held.values);
  if (keep) {
    held.keep = keep->contiguous();
    result.keep = held.keep.const_data_ptr<bool>();
  }
  return result;
}

}  // namespace

NormOutputs norm_forward(const char* op, const NormKernels& kernels, const NormInputs& inputs) {
  const Tensor& x = inputs.x;
  check_parameters(op, x, inputs.weight, inputs.bias, inputs.gate, inputs.keep);
  if (inputs.branch) check_like(op, "the branch", *inputs.branch, x);
  const c10::DeviceGuard guard(x.device());
  const auto statistics = [&] {
    return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(accumulation_type(x)));
  };
  NormOutputs out;
  if (inputs.branch) out.sum = at::empty(x.sizes(), x.options());
  if (inputs.weight) {
    out.y = at::empty(x.sizes(), x.options());
    out.rstd = statistics();
  }
  if (inputs.bias) out.mean = statistics();
  if (x.numel() == 0) {
    if (out.rstd.defined()) out.rstd.zero_();
    if (out.mean.defined()) out.mean.zero_();
    return out;
  }
  NormForward args{};
  const Tensor rows = as_rows(x);
  args.x = rows.const_data_ptr();
  args.x_stride = row_stride(rows);
  args.rows = rows.size(0);
  args.hidden = rows.size(1);
  args.eps = inputs.eps;
  args.dtype = dtype_of(rows);
  Tensor branch_rows, weight, bias;
  if (inputs.branch) {
    branch_rows = as_rows(*inputs.branch);
    args.branch = branch_rows.const_data_ptr();
    args.branch_stride = row_stride(branch_rows);
    args.sum = out.sum.mutable_data_ptr();
  }
  GateTensors gate;
  args.gate = make_gate(inputs.gate, inputs.keep, x, gate);
  if (inputs.weight) {
    weight = as_parameter(*inputs.weight, x);
    args.weight = weight.const_data_ptr();
    args.weight_dtype = dtype_of(weight);
    args.y = out.y.mutable_data_ptr();
    args.rstd = out.rstd.mutable_data_ptr();
  }
  if (inputs.bias) {
    bias = as_parameter(*inputs.bias, x);
    args.bias = bias.const_data_ptr();
    args.mean = out.mean.mutable_data_ptr();
  }
  check_launch(op, kernels.forward(args, current_stream(x)));
  return out;
}

NormGrads norm_backward(const char* op, const NormKernels& kernels, const NormGradInputs& inputs) {
  const Tensor& x = inputs.s ? *inputs.s : *inputs.grad_sum;  // any tensor of the shape of x
  // The layer norm's bias is not read, so its weight stands for it.
  check_parameters(op, x, inputs.weight, std::nullopt, inputs.gate, inputs.keep);
  if (inputs.grad) check_like(op, "grad", *inputs.grad, x);
  if (inputs.grad_sum) check_like(op, "the gradient of the sum", *inputs.grad_sum, x);
  if (inputs.branch) check_like(op, "the branch", *inputs.branch, x);
  for (const auto& [name, tensor] : {std::pair{"rstd", &inputs.rstd}, std::pair{"mean", &inputs.mean}}) {
    TORCH_CHECK(
        !*tensor || ((*tensor)->sizes() == x.sizes().slice(0, x.dim() - 1) &&
                     (*tensor)->scalar_type() == accumulation_type(x) && (*tensor)->device() == x.device()),
        "megamm::", op, ": ", name, " is not what the forward returned");
  }
  const c10::DeviceGuard guard(x.device());
  const auto acc = x.options().dtype(accumulation_type(x));
  const auto like_x = [&](bool needed) {
    return needed ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  };
  // In the dtype that the kernels write.
  const auto like_parameter = [&](bool needed, const MaybeTensor& parameter) {
    const auto options = x.is_cpu() || !parameter ? acc : parameter->options();
    return at::empty({needed ? parameter->size(0) : 0}, options);
  };
  const bool need_sum_grad = inputs.need_x || inputs.need_branch || inputs.need_gate;
  NormGrads out{like_x(inputs.s.has_value() && need_sum_grad), like_x(inputs.need_branch),
                like_parameter(inputs.need_gate, inputs.gate),
                like_parameter(inputs.need_weight, inputs.weight),
                like_parameter(inputs.need_bias, inputs.weight)};
  const auto finished = [&] {  // in the dtypes of the parameters
    if (inputs.gate) out.gate = out.gate.to(inputs.gate->scalar_type());
    if (inputs.weight) {
      out.weight = out.weight.to(inputs.weight->scalar_type());
      out.bias = out.bias.to(inputs.weight->scalar_type());
    }
    if (!inputs.need_x) out.x = at::empty({0}, x.options());
    return out;
  };
  if (x.numel() == 0) {
    out.gate.zero_();
    out.weight.zero_();
    out.bias.zero_();
    return finished();
  }
  if (!need_sum_grad && !inputs.need_weight && !inputs.need_bias) return finished();
  NormBackward args{};
  const Tensor x_rows = as_rows(x);
  args.rows = x_rows.size(0);
  args.hidden = x_rows.size(1);
  args.dtype = dtype_of(x_rows);
  Tensor grad_rows, grad_sum_rows, branch_rows, weight, mean, rstd;
  if (inputs.grad) {
    grad_rows = as_rows(*inputs.grad);
    args.grad = grad_rows.const_data_ptr();
    args.grad_stride = row_stride(grad_rows);
  }
  if (inputs.grad_sum) {
    grad_sum_rows = as_rows(*inputs.grad_sum);
    args.grad_sum = grad_sum_rows.const_data_ptr();
    args.grad_sum_stride = row_stride(grad_sum_rows);
  }
  if (inputs.s) {
    args.s = x_rows.const_data_ptr();
    args.s_stride = row_stride(x_rows);
    weight = as_parameter(*inputs.weight, x);
    args.weight = weight.const_data_ptr();
    args.weight_dtype = dtype_of(weight);
    rstd = inputs.rstd->contiguous();
    args.rstd = rstd.const_data_ptr();
    if (need_sum_grad) args.grad_x = out.x.mutable_data_ptr();
  }
  if (inputs.mean) {
    mean = inputs.mean->contiguous();
    args.mean = mean.const_data_ptr();
  }
  GateTensors gate;
  args.gate = make_gate(inputs.gate, inputs.keep, x, gate);
  if (inputs.need_branch) args.grad_branch = out.branch.mutable_data_ptr();
  if (inputs.need_gate) {
    TORCH_CHECK(inputs.branch, "megamm::", op, ": the gradient of the gate needs the branch");
    branch_rows = as_rows(*inputs.branch);
    args.branch = branch_rows.const_data_ptr();
    args.branch_stride = row_stride(branch_rows);
  }
  args.partial_rows = kernels.partial_rows(args);
  Tensor weight_partials, bias_partials, gate_partials;
  const auto partials = [&](bool needed, const Tensor& grad, Tensor& held, void*& target, void*& sums) {
    if (!needed) return;
    held = at::empty({args.partial_rows, grad.size(0)}, acc);
    sums = held.mutable_data_ptr();
    target = grad.mutable_data_ptr();
  };
  partials(inputs.need_weight, out.weight, weight_partials, args.grad_weight, args.weight_partials);
  partials(inputs.need_bias, out.bias, bias_partials, args.grad_bias, args.bias_partials);
  partials(inputs.need_gate, out.gate, gate_partials, args.grad_gate, args.gate_partials);
  check_launch(op, kernels.backward(args, current_stream(x)));
  return finished();
}

}  // namespace megamm
