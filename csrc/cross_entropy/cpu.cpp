// Cross entropy on the CPU. Math as in kernel.cu.
//
// Rows are dealt out to threads. A row is read block by block: the maximum of a block, then its sum of
// exponentials from a copy in the first-level cache, so memory is read and widened once; the sum so far is
// rescaled where a block raises the maximum. Sums within a block are kept in the accumulation type, those
// over the blocks in double: the error does not grow with the vocabulary.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../common/dispatch.h"
#include "../common/vec_exp.h"
#include "cross_entropy.h"

namespace megamm {
namespace {

constexpr int64_t kGrainElements = 1 << 13;  // below this a thread costs more than it saves
constexpr int64_t kBlock = 2048;             // elements; a multiple of every vector's width

int64_t grain_rows(int64_t columns) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
}

template <typename Acc>
Pair<Acc> exp_of(const Pair<Acc>& x) {
  return {vec_exp(x.lo), vec_exp(x.hi)};
}

// The first `count` lanes; -inf, whose exponential is 0, in the others.
template <typename Acc, typename Count>
C10_ALWAYS_INLINE Pair<Acc> or_lowest(const Pair<Acc>& value, Count count) {
  if constexpr (std::is_same_v<Count, std::integral_constant<int64_t, Pair<Acc>::kWidth>>) {
    return value;
  } else {
    using Vec = typename Pair<Acc>::Vec;
    const int64_t half = Pair<Acc>::kWidth / 2;
    const Vec lowest(-std::numeric_limits<Acc>::infinity());
    return {Vec::set(lowest, value.lo, std::min<int64_t>(count, half)),
            Vec::set(lowest, value.hi, std::max<int64_t>(0, count - half))};
  }
}

// Copies to `wide` and returns the largest of `start` and `size` elements; NaN if one of them is.
template <typename T>
acc_t<T> widen_and_find_maximum(const T* x, int64_t size, acc_t<T> start, acc_t<T>* wide) {
  using Acc = acc_t<T>;
  Pair<Acc> largest(start);
  for_each_pair<Acc>(size, [&](int64_t i, auto count) {
    const auto value = or_lowest(load(x + i, count), count);
    largest = {at::vec::maximum(largest.lo, value.lo), at::vec::maximum(largest.hi, value.hi)};
    store(wide + i, value, Pair<Acc>::kWidth);
  });
  Acc lanes[Pair<Acc>::Vec::size()];
  at::vec::maximum(largest.lo, largest.hi).store(lanes);
  for (const Acc lane : lanes) start = lane > start || std::isnan(lane) ? lane : start;
  return start;
}

// Sum of exp(wide - largest) over `size` elements and what widen_and_find_maximum put behind them.
template <typename Acc>
Acc sum_of_exponentials(const Acc* wide, int64_t size, Acc largest) {
  constexpr int64_t width = Pair<Acc>::kWidth;
  Pair<Acc> sum(0);
  const Pair<Acc> offset(largest);
  for (int64_t i = 0; i < size; i += width) sum = sum + exp_of(load(wide + i, width) - offset);
  return sum_lanes(sum);
}

template <typename T>
struct RowStatistics {
  acc_t<T> maximum, sum;
};

template <typename T>
RowStatistics<T> row_statistics(const T* x, int64_t size) {
  using Acc = acc_t<T>;
  Acc largest = std::numeric_limits<Acc>::lowest();
  double sum = 0;
  Acc wide[kBlock];
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = std::min(kBlock, size - begin);
    const Acc raised = widen_and_find_maximum(x + begin, count, largest, wide);
    if (raised != largest) sum *= std::exp(static_cast<double>(largest) - static_cast<double>(raised));
    largest = raised;
    sum += sum_of_exponentials(wide, count, largest);
  }
  if (!(largest <= std::numeric_limits<Acc>::max())) sum = std::numeric_limits<double>::quiet_NaN();
  return {largest, static_cast<Acc>(sum)};
}

template <typename T>
void statistics(const CrossEntropyStatistics& call) {
  using Acc = acc_t<T>;
  const CrossEntropyArgs& args = call.args;
  const auto* logits = static_cast<const T*>(args.logits);
  auto* out = static_cast<Acc*>(call.statistics);
  const auto write = [&](int64_t row, Acc maximum, Acc sum, Acc label_logit, Acc loss) {
    out[kMaximum * args.rows + row] = maximum;
    out[kSum * args.rows + row] = sum;
    out[kLabelLogit * args.rows + row] = label_logit;
    out[kLoss * args.rows + row] = loss;
  };
  at::parallel_for(0, args.rows, grain_rows(args.valid), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t label = args.labels[row];
      if (label == args.ignore_index) {
        write(row, 0, 1, 0, 0);
        continue;
      }
      const T* x = logits + row * args.stride;
      const auto found = row_statistics(x, args.valid);
      const int64_t column = label - args.vocab_start;
      Acc label_logit = 0;
      if (column >= 0 && column < args.valid) label_logit = static_cast<Acc>(x[column]);
      if (label < 0 || label >= args.vocab_size) label_logit = std::numeric_limits<Acc>::quiet_NaN();
      write(row, found.maximum, found.sum, label_logit, std::log(found.sum) + (found.maximum - label_logit));
    }
  });
}

// One row: (softmax - onehot) * weight. `grad` may be `x`.
template <typename T>
void gradient_row(const T* x, T* grad, int64_t valid, int64_t label_column, acc_t<T> maximum, acc_t<T> sum,
                  acc_t<T> weight) {
  using Acc = acc_t<T>;
  const bool has_label = label_column >= 0 && label_column < valid;
  const Acc at_label = has_label ? static_cast<Acc>(x[label_column]) : Acc(0);
  const Pair<Acc> offset(maximum), factor(weight / sum);
  for_each_pair<Acc>(valid, [&](int64_t i, auto count) {
    store(grad + i, exp_of(load(x + i, count) - offset) * factor, count);
  });
  if (has_label) grad[label_column] = static_cast<T>((std::exp(at_label - maximum) / sum - 1) * weight);
}

template <typename T>
void gradient(const CrossEntropyGradient& call) {
  using Acc = acc_t<T>;
  const CrossEntropyArgs& args = call.args;
  const auto* logits = static_cast<const T*>(args.logits);
  const auto* statistics = static_cast<const Acc*>(call.statistics);
  const auto* grad_loss = static_cast<const Acc*>(call.grad_loss);
  auto* grad = static_cast<T*>(call.grad);
  at::parallel_for(0, args.rows, grain_rows(args.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* to = grad + row * call.grad_stride;
      int64_t written = 0;
      if (args.labels[row] != args.ignore_index && grad_loss[row] != 0) {
        written = args.valid;
        gradient_row(logits + row * args.stride, to, args.valid, args.labels[row] - args.vocab_start,
                     statistics[kMaximum * args.rows + row], statistics[kSum * args.rows + row],
                     grad_loss[row]);
      }
      std::fill(to + written, to + args.columns, T(0));
    }
  });
}

}  // namespace

void cross_entropy_statistics_cpu(const CrossEntropyStatistics& call) {
  dispatch_cpu(call.args.dtype, [&](auto element) { statistics<decltype(element)>(call); });
}

void cross_entropy_gradient_cpu(const CrossEntropyGradient& call) {
  dispatch_cpu(call.args.dtype, [&](auto element) { gradient<decltype(element)>(call); });
}

}  // namespace megamm
