// Rotary positions: schema, argument checks and the way from tensors to the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensor.h"
#include "rope.h"
#ifdef MEGAMM_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace megamm {
namespace {

using at::Tensor;
using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// [tokens, heads, d] or [sequence, batch, heads, d] as the latter, with a dense last dimension.
Tensor as_heads(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 3 || x.dim() == 4, "megamm::rope: ", name, " is ", x.sizes(),
              ", expected [tokens, heads, d] or [sequence, batch, heads, d]");
  const Tensor heads = x.dim() == 4 ? x : x.unsqueeze(1);
  return heads.size(3) == 1 || heads.stride(3) == 1 ? heads : heads.contiguous();
}

// The heads of `x` from element `offset` of its last dimension on; `group_heads` of them side by side.
RopeView view_of(const Tensor& x, int64_t offset, int64_t head_dim) {
  RopeView view{};
  view.data = static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + offset * x.element_size();
  view.sequence_stride = x.stride(0);
  view.batch_stride = x.stride(1);
  view.group_stride = x.stride(2);
  view.head_stride = head_dim;
  return view;
}

RopePart part_of(const Tensor& from, const Tensor& to) {
  return {view_of(from, 0, 0), view_of(to, 0, 0), from.size(2), 1, true};
}

// The arguments without the parts. The table and the positions must outlive the launch.
Rope arguments(const Tensor& x, int64_t head_dim, const Tensor& table,
               const std::optional<Tensor>& positions) {
  TORCH_CHECK(table.dim() == 2 && table.size(1) % 2 == 0 && table.size(1) <= head_dim,
              "megamm::rope: table is ", table.sizes(), ", expected [positions, an even number up to ",
              head_dim, "]");
  TORCH_CHECK(table.device() == x.device(), "megamm::rope: the heads are on ", x.device(), ", table on ",
              table.device());
  Rope args{};
  args.sequence = x.size(0);
  args.batch = x.size(1);
  args.head_dim = head_dim;
  args.rotary_dim = table.size(1);
  args.table = table.const_data_ptr();
  args.table_rows = table.size(0);
  args.dtype = dtype_of(x);
  if (!positions.has_value()) {
    TORCH_CHECK(table.size(0) >= x.size(0), "megamm::rope: the table has ", table.size(0),
                " rows for a sequence of ", x.size(0));
    return args;
  }
  TORCH_CHECK(positions->scalar_type() == at::kLong && positions->device() == x.device(),
              "megamm::rope: positions are ", positions->scalar_type(), " on ", positions->device(),
              ", expected long on ", x.device());
  TORCH_CHECK(positions->size(0) == x.size(0) &&
                  (positions->dim() == 1 || (positions->dim() == 2 && positions->size(1) == x.size(1))),
              "megamm::rope: positions are ", positions->sizes(), ", expected [", x.size(0), "] or [",
              x.size(0), ", ", x.size(1), "]");
  args.positions = positions->const_data_ptr<int64_t>();
  args.position_sequence_stride = positions->stride(0);
  args.position_batch_stride = positions->dim() == 2 ? positions->stride(1) : 0;
  return args;
}

// The table as the kernels take it.
Tensor dense_table(const Tensor& table, const Tensor& x) {
  TORCH_CHECK(table.scalar_type() == at::kFloat, "megamm::rope: table is ", table.scalar_type(),
              ", expected float");
  return table.to(accumulation_type(x)).contiguous();
}

template <typename Launch>
TwoTensors rope(const Tensor& q, const Tensor& k, const Tensor& table, const std::optional<Tensor>& positions,
                bool inverse, const Launch& launch) {
  const Tensor q_heads = as_heads(q, "q"), k_heads = as_heads(k, "k");
  TORCH_CHECK(q_heads.size(0) == k_heads.size(0) && q_heads.size(1) == k_heads.size(1) &&
                  q_heads.size(3) == k_heads.size(3) && q.dim() == k.dim(),
              "megamm::rope: q is ", q.sizes(), ", k is ", k.sizes(),
              ": they may differ in their heads only");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.device() == k.device(), "megamm::rope: q is ",
              q.scalar_type(), " on ", q.device(), ", k is ", k.scalar_type(), " on ", k.device());
  const Tensor dense = dense_table(table, q);
  Rope args = arguments(q_heads, q_heads.size(3), dense, positions);
  const Tensor q_out = at::empty(q_heads.sizes(), q.options()),
               k_out = at::empty(k_heads.sizes(), k.options());
  for (const auto& part : {part_of(q_heads, q_out), part_of(k_heads, k_out)}) {
    if (part.heads > 0) args.parts[args.num_parts++] = part;
  }
  args.inverse = inverse;
  if (q.numel() + k.numel() > 0) launch(args);
  return {q_out.view(q.sizes()), k_out.view(k.sizes())};
}

// Sets the parts of `args`: between the groups of `qkv` and q, k and v, in one direction or the other.
void set_parts(Rope& args, const Tensor& qkv, const Tensor& q, const Tensor& k, const Tensor& v, bool split) {
  const int64_t d = args.head_dim, groups = k.size(2), per_group = q.size(2) / groups;
  const auto part = [&](int64_t offset, const Tensor& heads, int64_t group_heads, bool rotated) {
    const RopeView in_group = view_of(qkv, offset, d);
    RopeView alone = view_of(heads, 0, heads.stride(2));
    alone.group_stride = group_heads * heads.stride(2);
    args.parts[args.num_parts++] = {split ? in_group : alone, split ? alone : in_group, heads.size(2),
                                    group_heads, rotated};
  };
  part(0, q, per_group, true);
  part(per_group * d, k, 1, true);
  part((per_group + 1) * d, v, 1, false);
}

template <typename Launch>
ThreeTensors rope_qkv(const Tensor& qkv, int64_t head_dim, const Tensor& table,
                      const std::optional<Tensor>& positions, const Launch& launch) {
  const Tensor groups = as_heads(qkv, "qkv");
  TORCH_CHECK(
      groups.size(2) > 0 && head_dim > 0 && groups.size(3) % head_dim == 0 && groups.size(3) >= 3 * head_dim,
      "megamm::rope_qkv: qkv is ", qkv.sizes(), ", expected [..., groups, (queries + 2) * ", head_dim, "]");
  const int64_t per_group = groups.size(3) / head_dim - 2;
  const Tensor dense = dense_table(table, qkv);
  Rope args = arguments(groups, head_dim, dense, positions);
  const auto allocate = [&](int64_t heads) {
    return at::empty({groups.size(0), groups.size(1), heads, head_dim}, qkv.options());
  };
  const Tensor q = allocate(groups.size(2) * per_group), k = allocate(groups.size(2)),
               v = allocate(groups.size(2));
  if (qkv.numel() > 0) {
    set_parts(args, groups, q, k, v, true);
    launch(args);
  }
  if (qkv.dim() == 4) return {q, k, v};
  return {q.squeeze(1), k.squeeze(1), v.squeeze(1)};
}

template <typename Launch>
Tensor rope_qkv_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                         const Tensor& table, const std::optional<Tensor>& positions, const Launch& launch) {
  const Tensor q = as_heads(grad_q, "grad_q"), k = as_heads(grad_k, "grad_k"), v = as_heads(grad_v, "grad_v");
  TORCH_CHECK(
      k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3),
      "megamm::rope_qkv_backward: the gradients are ", grad_q.sizes(), ", ", grad_k.sizes(), " and ",
      grad_v.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                  q.device() == k.device() && q.device() == v.device(),
              "megamm::rope_qkv_backward: the gradients differ in dtype or device");
  const int64_t groups = k.size(2), d = k.size(3);
  TORCH_CHECK(groups > 0 && q.size(2) % groups == 0, "megamm::rope_qkv_backward: ", q.size(2),
              " queries for ", groups, " keys");
  const Tensor dense = dense_table(table, q);
  Rope args = arguments(q, d, dense, positions);
  args.inverse = true;
  const int64_t width = (q.size(2) / groups + 2) * d;
  const Tensor grad = at::empty({q.size(0), q.size(1), groups, width}, q.options());
  if (grad.numel() > 0) {
    set_parts(args, grad, q, k, v, false);
    launch(args);
  }
  return grad_q.dim() == 4 ? grad : grad.squeeze(1);
}

TwoTensors rope_on_cpu(const Tensor& q, const Tensor& k, const Tensor& table,
                       const std::optional<Tensor>& positions, bool inverse) {
  return rope(q, k, table, positions, inverse, rope_cpu);
}

ThreeTensors rope_qkv_on_cpu(const Tensor& qkv, int64_t head_dim, const Tensor& table,
                             const std::optional<Tensor>& positions) {
  return rope_qkv(qkv, head_dim, table, positions, rope_cpu);
}

Tensor rope_qkv_backward_on_cpu(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                                const Tensor& table, const std::optional<Tensor>& positions) {
  return rope_qkv_backward(grad_q, grad_k, grad_v, table, positions, rope_cpu);
}

#ifdef MEGAMM_WITH_CUDA
void launch_on_cuda(const Rope& args) {
  const char* error = rope_cuda(args, c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == nullptr, "megamm::rope: ", error);
}

TwoTensors rope_on_cuda(const Tensor& q, const Tensor& k, const Tensor& table,
                        const std::optional<Tensor>& positions, bool inverse) {
  const c10::cuda::CUDAGuard guard(q.device());
  return rope(q, k, table, positions, inverse, launch_on_cuda);
}

ThreeTensors rope_qkv_on_cuda(const Tensor& qkv, int64_t head_dim, const Tensor& table,
                              const std::optional<Tensor>& positions) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  return rope_qkv(qkv, head_dim, table, positions, launch_on_cuda);
}

Tensor rope_qkv_backward_on_cuda(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                                 const Tensor& table, const std::optional<Tensor>& positions) {
  const c10::cuda::CUDAGuard guard(grad_q.device());
  return rope_qkv_backward(grad_q, grad_k, grad_v, table, positions, launch_on_cuda);
}
#endif

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def("rope(Tensor q, Tensor k, Tensor table, Tensor? positions, bool inverse) -> (Tensor, Tensor)");
  m.def(
      "rope_qkv(Tensor qkv, int head_dim, Tensor table, Tensor? positions) -> (Tensor q, Tensor k, Tensor "
      "v)");
  m.def(
      "rope_qkv_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor table, Tensor? positions) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) {
  m.impl("rope", rope_on_cpu);
  m.impl("rope_qkv", rope_qkv_on_cpu);
  m.impl("rope_qkv_backward", rope_qkv_backward_on_cpu);
}

#ifdef MEGAMM_WITH_CUDA
TORCH_LIBRARY_IMPL(megamm, CUDA, m) {
  m.impl("rope", rope_on_cuda);
  m.impl("rope_qkv", rope_qkv_on_cuda);
  m.impl("rope_qkv_backward", rope_qkv_backward_on_cuda);
}
#endif

}  // namespace
}  // namespace megamm
