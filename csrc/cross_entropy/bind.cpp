// Cross entropy: schema, argument checks and the way from tensors to the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/tensor.h"
#include "cross_entropy.h"
#ifdef MEGAMM_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace megamm {
namespace {

using at::Tensor;

// A row's elements lie next to each other; a view wherever they already do.
Tensor with_dense_rows(const Tensor& logits) {
  return logits.size(1) <= 1 || logits.stride(1) == 1 ? logits : logits.contiguous();
}

// What both operators take. `rows` and `dense_labels` must outlive the result.
CrossEntropyArgs arguments(const Tensor& rows, const Tensor& dense_labels, int64_t vocab_start,
                           int64_t vocab_size, int64_t ignore_index) {
  CrossEntropyArgs args{};
  args.logits = rows.const_data_ptr();
  args.stride = row_stride(rows);
  args.labels = dense_labels.const_data_ptr<int64_t>();
  args.rows = rows.size(0);
  args.columns = rows.size(1);
  args.vocab_start = vocab_start;
  args.vocab_size = vocab_size;
  args.valid = std::clamp<int64_t>(vocab_size - vocab_start, 0, args.columns);
  args.ignore_index = ignore_index;
  args.dtype = dtype_of(rows);
  return args;
}

void check_inputs(const Tensor& logits, const Tensor& labels) {
  TORCH_CHECK(logits.dim() == 2, "megamm::cross_entropy: logits are ", logits.sizes(), ", expected [T, V]");
  TORCH_CHECK(labels.dim() == 1 && labels.size(0) == logits.size(0), "megamm::cross_entropy: labels are ",
              labels.sizes(), ", logits ", logits.sizes());
  TORCH_CHECK(labels.scalar_type() == at::kLong, "megamm::cross_entropy: labels are ", labels.scalar_type(),
              ", expected int64");
  TORCH_CHECK(labels.device() == logits.device(), "megamm::cross_entropy: logits are on ", logits.device(),
              ", labels on ", labels.device());
}

void check_per_row(const Tensor& logits, const Tensor& statistics, const Tensor& grad_loss) {
  const int64_t rows = logits.size(0);
  TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 2 && statistics.size(1) == rows &&
                  statistics.scalar_type() == accumulation_type(logits),
              "megamm::cross_entropy_gradient: statistics are not maximum and sum of each row");
  TORCH_CHECK(grad_loss.dim() == 1 && grad_loss.size(0) == rows &&
                  grad_loss.scalar_type() == accumulation_type(logits),
              "megamm::cross_entropy_gradient: grad_loss is not one ", accumulation_type(logits),
              " for each row");
}

template <typename Launch>
Tensor statistics(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t vocab_size,
                  int64_t ignore_index, const Launch& launch) {
  check_inputs(logits, labels);
  const Tensor result =
      at::empty({kStatistics, logits.size(0)}, logits.options().dtype(accumulation_type(logits)));
  if (logits.size(0) == 0) return result;
  const Tensor rows = with_dense_rows(logits), dense_labels = labels.contiguous();
  CrossEntropyStatistics call{};
  call.args = arguments(rows, dense_labels, vocab_start, vocab_size, ignore_index);
  call.statistics = result.mutable_data_ptr();
  launch(call);
  return result;
}

// Writes to `grad`, whose rows are dense; it may be `logits`.
template <typename Launch>
void gradient(const Tensor& logits, const Tensor& labels, const Tensor& row_statistics,
              const Tensor& grad_loss, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
              const Tensor& grad, const Launch& launch) {
  check_inputs(logits, labels);
  check_per_row(logits, row_statistics, grad_loss);
  if (logits.numel() == 0) return;
  const Tensor rows = with_dense_rows(logits), dense_labels = labels.contiguous();
  const Tensor dense_statistics = row_statistics.contiguous(), dense_grad_loss = grad_loss.contiguous();
  CrossEntropyGradient call{};
  call.args = arguments(rows, dense_labels, vocab_start, vocab_size, ignore_index);
  call.statistics = dense_statistics.const_data_ptr();
  call.grad_loss = dense_grad_loss.const_data_ptr();
  call.grad = grad.mutable_data_ptr();
  call.grad_stride = row_stride(grad);
  launch(call);
}

template <typename Launch>
Tensor new_gradient(const Tensor& logits, const Tensor& labels, const Tensor& statistics,
                    const Tensor& grad_loss, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                    const Launch& launch) {
  const Tensor grad = at::empty(logits.sizes(), logits.options());
  gradient(logits, labels, statistics, grad_loss, vocab_start, vocab_size, ignore_index, grad, launch);
  return grad;
}

template <typename Launch>
void gradient_in_place(const Tensor& logits, const Tensor& labels, const Tensor& statistics,
                       const Tensor& grad_loss, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                       const Launch& launch) {
  TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1) &&
                  (logits.size(0) <= 1 || logits.stride(0) >= logits.size(1)),
              "megamm::cross_entropy_gradient_: the rows of logits are not dense or overlap, so they cannot ",
              "hold the gradient");
  gradient(logits, labels, statistics, grad_loss, vocab_start, vocab_size, ignore_index, logits, launch);
  // so that autograd refuses to go on where it still needed the logits
  if (!logits.is_inference()) logits.unsafeGetTensorImpl()->bump_version();
}

void check_labels(const Tensor& labels, int64_t vocab_size, int64_t ignore_index) {
  const Tensor dense_labels = labels.contiguous();
  const auto* label = dense_labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < labels.numel(); ++i) {
    TORCH_CHECK_INDEX(label[i] == ignore_index || (label[i] >= 0 && label[i] < vocab_size), "label ",
                      label[i], " is not in a vocabulary of ", vocab_size);
  }
}

Tensor statistics_cpu(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t vocab_size,
                      int64_t ignore_index) {
  check_inputs(logits, labels);
  check_labels(labels, vocab_size, ignore_index);
  return statistics(logits, labels, vocab_start, vocab_size, ignore_index, cross_entropy_statistics_cpu);
}

Tensor gradient_cpu(const Tensor& logits, const Tensor& labels, const Tensor& statistics,
                    const Tensor& grad_loss, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index) {
  return new_gradient(logits, labels, statistics, grad_loss, vocab_start, vocab_size, ignore_index,
                      cross_entropy_gradient_cpu);
}

void gradient_in_place_cpu(const Tensor& logits, const Tensor& labels, const Tensor& statistics,
                           const Tensor& grad_loss, int64_t vocab_start, int64_t vocab_size,
                           int64_t ignore_index) {
  gradient_in_place(logits, labels, statistics, grad_loss, vocab_start, vocab_size, ignore_index,
                    cross_entropy_gradient_cpu);
}

#ifdef MEGAMM_WITH_CUDA
void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "megamm::cross_entropy: ", error); }

void launch_gradient(const CrossEntropyGradient& call) {
  check_launch(cross_entropy_gradient_cuda(call, c10::cuda::getCurrentCUDAStream().stream()));
}

Tensor statistics_cuda(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t vocab_size,
                       int64_t ignore_index) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto launch = [](const CrossEntropyStatistics& call) {
    check_launch(cross_entropy_statistics_cuda(call, c10::cuda::getCurrentCUDAStream().stream()));
  };
  return statistics(logits, labels, vocab_start, vocab_size, ignore_index, launch);
}

Tensor gradient_cuda(const Tensor& logits, const Tensor& labels, const Tensor& statistics,
                     const Tensor& grad_loss, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return new_gradient(logits, labels, statistics, grad_loss, vocab_start, vocab_size, ignore_index,
                      launch_gradient);
}

void gradient_in_place_cuda(const Tensor& logits, const Tensor& labels, const Tensor& statistics,
                            const Tensor& grad_loss, int64_t vocab_start, int64_t vocab_size,
                            int64_t ignore_index) {
  const c10::cuda::CUDAGuard guard(logits.device());
  gradient_in_place(logits, labels, statistics, grad_loss, vocab_start, vocab_size, ignore_index,
                    launch_gradient);
}
#endif

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def(
      "cross_entropy_statistics(Tensor logits, Tensor labels, int vocab_start, int vocab_size, "
      "int ignore_index) -> Tensor");
  m.def(
      "cross_entropy_gradient(Tensor logits, Tensor labels, Tensor statistics, Tensor grad_loss, "
      "int vocab_start, int vocab_size, int ignore_index) -> Tensor");
  m.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor statistics, Tensor grad_loss, "
      "int vocab_start, int vocab_size, int ignore_index) -> ()");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) {
  m.impl("cross_entropy_statistics", statistics_cpu);
  m.impl("cross_entropy_gradient", gradient_cpu);
  m.impl("cross_entropy_gradient_", gradient_in_place_cpu);
}

#ifdef MEGAMM_WITH_CUDA
TORCH_LIBRARY_IMPL(megamm, CUDA, m) {
  m.impl("cross_entropy_statistics", statistics_cuda);
  m.impl("cross_entropy_gradient", gradient_cuda);
  m.impl("cross_entropy_gradient_", gradient_in_place_cuda);
}
#endif

}  // namespace
}  // namespace megamm
