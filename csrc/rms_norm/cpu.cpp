// RMSNorm on the CPU. Math as in kernel.cu.
//
// Rows are dealt out to threads. Within a row there are two passes, one for the sum and one for the output;
// the row is in cache the second time, so memory is read once. The weight gradient is summed per block of
// rows, then over the blocks; the blocks depend on the number of rows alone, so the result does not depend on
// the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "../common/vec.h"
#include "rms_norm.h"

namespace megamm {
namespace {

constexpr int64_t kGrainElements = 1 << 14;  // below this a thread costs more than it saves
constexpr int64_t kMinBlockRows = 32;        // rows that share a partial weight gradient
constexpr int64_t kMaxBlocks = 64;

int64_t grain_rows(int64_t hidden) { return std::max<int64_t>(1, kGrainElements / hidden); }

template <typename T>
void forward_row(const T* x, const acc_t<T>* weight, T* y, acc_t<T>* rstd, int64_t hidden, double eps) {
  using Acc = acc_t<T>;
  Pair<Acc> squares(0);
  for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
    const auto value = load(x + i, count);
    squares = squares + value * value;
  });
  *rstd = Acc(1) / std::sqrt(sum_lanes(squares) / static_cast<Acc>(hidden) + static_cast<Acc>(eps));
  const Pair<Acc> scale(*rstd);
  for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
    store(y + i, load(x + i, count) * scale * load(weight + i, count), count);
  });
}

template <typename T>
void forward(const RmsNormForward& args) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const acc_t<T>*>(args.weight);
  auto* y = static_cast<T*>(args.y);
  auto* rstd = static_cast<acc_t<T>*>(args.rstd);
  at::parallel_for(0, args.rows, grain_rows(args.hidden), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      forward_row(x + row * args.x_stride, weight, y + row * args.hidden, rstd + row, args.hidden, args.eps);
    }
  });
}

// One row: grad_x if wanted; its share of grad_weight is added to `partial` if that is not null.
template <typename T>
void backward_row(const RmsNormBackward& args, int64_t row, acc_t<T>* partial) {
  using Acc = acc_t<T>;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* grad = static_cast<const T*>(args.grad) + row * args.grad_stride;
  const Acc* weight = static_cast<const Acc*>(args.weight);
  const Pair<Acc> rstd(static_cast<const Acc*>(args.rstd)[row]);
  Pair<Acc> products(0);
  for_each_pair<Acc>(args.hidden, [&](int64_t i, auto count) {
    const auto product = load(grad + i, count) * load(x + i, count) * rstd;
    products = products + product * load(weight + i, count);
    if (partial != nullptr) store(partial + i, load(partial + i, count) + product, count);
  });
  if (args.grad_x == nullptr) return;
  T* grad_x = static_cast<T*>(args.grad_x) + row * args.hidden;
  const Pair<Acc> along_x = rstd * Pair<Acc>(sum_lanes(products) / static_cast<Acc>(args.hidden));
  for_each_pair<Acc>(args.hidden, [&](int64_t i, auto count) {
    const auto weighted = load(grad + i, count) * load(weight + i, count);
    store(grad_x + i, rstd * (weighted - load(x + i, count) * along_x), count);
  });
}

template <typename T>
void sum_partials(const acc_t<T>* partials, int64_t blocks, int64_t hidden, acc_t<T>* total) {
  std::copy_n(partials, hidden, total);
  for (int64_t block = 1; block < blocks; ++block) {
    for (int64_t i = 0; i < hidden; ++i) total[i] += partials[block * hidden + i];
  }
}

template <typename T>
void backward(const RmsNormBackward& args) {
  using Acc = acc_t<T>;
  const int64_t rows = args.rows, hidden = args.hidden;
  if (args.grad_weight == nullptr) {
    at::parallel_for(0, rows, grain_rows(hidden), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) backward_row<T>(args, row, nullptr);
    });
    return;
  }
  auto* partials = static_cast<Acc*>(args.partials);
  const int64_t blocks = args.partial_rows;
  const int64_t grain = std::max<int64_t>(1, grain_rows(hidden) * blocks / rows);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Acc* partial = partials + block * hidden;
      std::fill_n(partial, hidden, Acc(0));
      for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) {
        backward_row<T>(args, row, partial);
      }
    }
  });
  sum_partials<T>(partials, blocks, hidden, static_cast<Acc*>(args.grad_weight));
}

// Calls run(T{}) with the element type that `dtype` names.
template <typename Run>
void dispatch(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kFloat16:
      return run(c10::Half{});
    case DType::kBFloat16:
      return run(c10::BFloat16{});
  }
}

}  // namespace

int64_t rms_norm_partial_rows_cpu(int64_t rows) {
  return std::min(kMaxBlocks, (rows + kMinBlockRows - 1) / kMinBlockRows);
}

void rms_norm_forward_cpu(const RmsNormForward& args) {
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args); });
}

void rms_norm_backward_cpu(const RmsNormBackward& args) {
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace megamm
