// The CPU kernels of norm.h, as templates.
//
// Rows are dealt out to threads. Within a row there are two passes, one for sums and one for the output: the
// row is in cache the second time, so memory is read once. Sums over rows are kept per block of rows, then
// added up over the blocks; the blocks depend on the number of rows alone, so the result does not depend on
// the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "norm.h"
#include "vec.h"

namespace megamm {

constexpr int64_t kNormGrainElements = 1 << 14;  // below this a thread costs more than it saves
constexpr int64_t kNormMinBlockRows = 32;        // rows that share a partial sum
constexpr int64_t kNormMaxBlocks = 64;

// Rounds to T, writes the first `count` lanes and returns what was written.
template <typename T, typename Count>
inline Pair<acc_t<T>> store_rounded(T* to, const Pair<acc_t<T>>& value, Count count) {
  store(to, value, count);
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return value;
  } else {
    const auto [lo, hi] = at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(value.lo, value.hi));
    return {lo, hi};
  }
}

// `value` with zeros in the lanes from `count` on.
template <typename Acc, typename Count>
inline Pair<Acc> first_lanes(const Pair<Acc>& value, Count count) {
  using Vec = at::vec::Vectorized<Acc>;
  constexpr int64_t half = Vec::size();
  if constexpr (std::is_same_v<Count, int64_t>) {
    return {Vec::set(Vec(0), value.lo, std::min(count, half)),
            Vec::set(Vec(0), value.hi, std::max<int64_t>(0, count - half))};
  } else {
    return value;  // a full stretch
  }
}

// tanh of the gate for every column.
template <typename Acc>
std::vector<Acc> gate_scales(const Gate& gate, int64_t hidden) {
  const auto* values = static_cast<const Acc*>(gate.values);
  std::vector<Acc> scales(hidden);
  if (gate.per_column) {
    for (int64_t i = 0; i < hidden; ++i) scales[i] = std::tanh(values[i]);
  } else {
    std::fill(scales.begin(), scales.end(), std::tanh(values[0]));
  }
  return scales;
}

// Mean and variance from one pass: sums of the differences from a guess of the mean, that of the first
// stretch, and of their squares. If the guess is further off than a standard deviation, the squares cancel
// too much: a second pass has a better one.
template <typename Acc>
class Moments {
 public:
  template <typename Count>
  void add(int64_t i, const Pair<Acc>& value, Count count) {
    if (i == 0) center_ = Pair<Acc>(sum_lanes(value) / static_cast<Acc>(count));
    add_difference(first_lanes(value - center_, count));
  }

  // read(i, count) gives the values once more.
  template <typename Read>
  void finish(int64_t size, const Read& read) {
    reduce(size);
    if (!(shift_ * shift_ > variance_)) return;
    center_ = Pair<Acc>(mean_);
    sum_ = squares_ = Pair<Acc>(0);
    for_each_pair<Acc>(
        size, [&](int64_t i, auto count) { add_difference(first_lanes(read(i, count) - center_, count)); });
    reduce(size);
  }

  Acc mean() const { return mean_; }
  Acc variance() const { return variance_; }

 private:
  void add_difference(const Pair<Acc>& difference) {
    sum_ = sum_ + difference;
    squares_ = squares_ + difference * difference;
  }

  void reduce(int64_t size) {
    Acc center[Pair<Acc>::Vec::size()];
    center_.lo.store(center);
    shift_ = sum_lanes(sum_) / static_cast<Acc>(size);
    mean_ = center[0] + shift_;
    variance_ = std::max(Acc(0), sum_lanes(squares_) / static_cast<Acc>(size) - shift_ * shift_);
  }

  Pair<Acc> center_{0}, sum_{0}, squares_{0};
  Acc shift_ = 0, mean_ = 0, variance_ = 0;
};

template <typename T, Norm kNorm, Join kJoin>
void norm_forward_row(const NormForward& args, const acc_t<T>* scales, int64_t row) {
  using Acc = acc_t<T>;
  const int64_t hidden = args.hidden;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* s = x;
  Pair<Acc> squares(0);  // for RMSNorm
  Moments<Acc> moments;  // for the layer norm
  const auto add = [&](int64_t i, const Pair<Acc>& value, auto count) {
    if constexpr (kNorm == Norm::kRms) squares = squares + value * value;
    if constexpr (kNorm == Norm::kLayer) moments.add(i, value, count);
  };
  if constexpr (kJoin == Join::kNone) {
    for_each_pair<Acc>(hidden, [&](int64_t i, auto count) { add(i, load(x + i, count), count); });
  } else {
    const T* branch = static_cast<const T*>(args.branch) + row * args.branch_stride;
    T* sum = static_cast<T*>(args.sum) + row * hidden;
    s = sum;
    if (args.gate.keep != nullptr && !args.gate.keep[row]) {
      for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
        const auto value = load(x + i, count);
        store(sum + i, value, count);
        add(i, value, count);
      });
    } else {
      for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
        auto update = load(branch + i, count);
        if constexpr (kJoin == Join::kGate) update = update * load(scales + i, count);
        add(i, store_rounded(sum + i, load(x + i, count) + update, count), count);
      });
    }
  }
  if constexpr (kNorm == Norm::kNone) return;
  const auto* weight = static_cast<const Acc*>(args.weight);
  T* y = static_cast<T*>(args.y) + row * hidden;
  Acc variance;
  if constexpr (kNorm == Norm::kRms) {
    variance = sum_lanes(squares) / static_cast<Acc>(hidden);
  } else {
    moments.finish(hidden, [&](int64_t i, auto count) { return load(s + i, count); });
    static_cast<Acc*>(args.mean)[row] = moments.mean();
    variance = moments.variance();
  }
  const Acc rstd = Acc(1) / std::sqrt(variance + static_cast<Acc>(args.eps));
  static_cast<Acc*>(args.rstd)[row] = rstd;
  const Pair<Acc> scale(rstd);
  if constexpr (kNorm == Norm::kRms) {
    for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
      store(y + i, load(s + i, count) * scale * load(weight + i, count), count);
    });
  } else {
    const auto* bias = static_cast<const Acc*>(args.bias);
    const Pair<Acc> center(moments.mean());
    for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
      const auto normed = (load(s + i, count) - center) * scale;
      store(y + i, normed * load(weight + i, count) + load(bias + i, count), count);
    });
  }
}

// A block's sums over its rows; null: not wanted.
template <typename Acc>
struct NormPartials {
  Acc *weight, *bias, *gate;
};

// What the gate does to `grad`, the gradient of s: [i, i + count) of grad_branch and of the gate's sums.
template <typename T, typename Count>
inline void gate_backward(const NormBackward& args, const acc_t<T>* scales, int64_t row, int64_t i,
                          Count count, const Pair<acc_t<T>>& grad, acc_t<T>* columns, Pair<acc_t<T>>& total) {
  const int64_t at = row * args.hidden + i;
  if (args.grad_branch != nullptr) {
    store(static_cast<T*>(args.grad_branch) + at, grad * load(scales + i, count), count);
  }
  if (args.gate_partials == nullptr) return;
  const auto product = grad * load(static_cast<const T*>(args.branch) + row * args.branch_stride + i, count);
  if (columns != nullptr) {
    store(columns + i, load(columns + i, count) + product, count);
  } else {
    total = total + product;
  }
}

template <typename T, Norm kNorm, Join kJoin>
void norm_backward_row(const NormBackward& args, const acc_t<T>* scales, int64_t row,
                       const NormPartials<acc_t<T>>& partials) {
  using Acc = acc_t<T>;
  const int64_t hidden = args.hidden;
  const T* grad_sum = static_cast<const T*>(args.grad_sum);
  if (grad_sum != nullptr) grad_sum += row * args.grad_sum_stride;
  const bool gated = kJoin == Join::kGate && (args.gate.keep == nullptr || args.gate.keep[row]);
  Acc* gate_columns = args.gate.per_column ? partials.gate : nullptr;
  Pair<Acc> gate_total(0);
  if constexpr (kNorm == Norm::kNone) {
    if (gated) {
      for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
        gate_backward<T>(args, scales, row, i, count, load(grad_sum + i, count), gate_columns, gate_total);
      });
    }
  } else {
    const T* s = static_cast<const T*>(args.s) + row * args.s_stride;
    const T* grad = static_cast<const T*>(args.grad) + row * args.grad_stride;
    const auto* weight = static_cast<const Acc*>(args.weight);
    const Pair<Acc> rstd(static_cast<const Acc*>(args.rstd)[row]);
    const Pair<Acc> center(kNorm == Norm::kLayer ? static_cast<const Acc*>(args.mean)[row] : Acc(0));
    const auto centered = [&](int64_t i, auto count) {
      const auto value = load(s + i, count);
      if constexpr (kNorm == Norm::kLayer) return value - center;
      return value;
    };
    Pair<Acc> products(0), weighted_sum(0);
    for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
      const auto grads = load(grad + i, count), weights = load(weight + i, count);
      const auto product = grads * centered(i, count) * rstd;
      products = products + product * weights;
      if constexpr (kNorm == Norm::kLayer) weighted_sum = weighted_sum + grads * weights;
      if (partials.weight != nullptr) {
        store(partials.weight + i, load(partials.weight + i, count) + product, count);
      }
      if constexpr (kNorm == Norm::kLayer) {
        if (partials.bias != nullptr) {
          store(partials.bias + i, load(partials.bias + i, count) + grads, count);
        }
      }
    });
    if (args.grad_x == nullptr) return;
    T* grad_x = static_cast<T*>(args.grad_x) + row * hidden;
    const Pair<Acc> along_s = rstd * Pair<Acc>(sum_lanes(products) / static_cast<Acc>(hidden));
    const Pair<Acc> along_ones(sum_lanes(weighted_sum) / static_cast<Acc>(hidden));
    const auto write = [&](auto with_sum, auto with_gate) {
      for_each_pair<Acc>(hidden, [&](int64_t i, auto count) {
        auto weighted = load(grad + i, count) * load(weight + i, count);
        if constexpr (kNorm == Norm::kLayer) weighted = weighted - along_ones;
        auto result = rstd * (weighted - centered(i, count) * along_s);
        if constexpr (with_sum) result = result + load(grad_sum + i, count);
        store(grad_x + i, result, count);
        if constexpr (with_gate) {
          gate_backward<T>(args, scales, row, i, count, result, gate_columns, gate_total);
        }
      });
    };
    const auto choose = [&](auto with_sum) {
      if constexpr (kJoin == Join::kGate) {
        if (gated) return write(with_sum, std::true_type{});
      }
      write(with_sum, std::false_type{});
    };
    if (grad_sum != nullptr) {
      choose(std::true_type{});
    } else {
      choose(std::false_type{});
    }
  }
  if constexpr (kJoin == Join::kGate) {
    if (!gated && args.grad_branch != nullptr) {
      std::fill_n(static_cast<T*>(args.grad_branch) + row * hidden, hidden, T(0));
    }
    if (partials.gate != nullptr && gate_columns == nullptr) *partials.gate += sum_lanes(gate_total);
  }
}

// total[i] = sum of column i of partials.
template <typename Acc>
void sum_rows(const Acc* partials, int64_t rows, int64_t width, Acc* total) {
  std::copy_n(partials, width, total);
  for (int64_t row = 1; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) total[i] += partials[row * width + i];
  }
}

template <typename T, Norm kNorm, Join kJoin>
void norm_forward(const NormForward& args) {
  using Acc = acc_t<T>;
  std::vector<Acc> scales;
  if constexpr (kJoin == Join::kGate) scales = gate_scales<Acc>(args.gate, args.hidden);
  const int64_t grain = std::max<int64_t>(1, kNormGrainElements / args.hidden);
  at::parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) norm_forward_row<T, kNorm, kJoin>(args, scales.data(), row);
  });
}

inline int64_t norm_partial_rows_cpu(const NormBackward& args) {
  return std::min(kNormMaxBlocks, (args.rows + kNormMinBlockRows - 1) / kNormMinBlockRows);
}

template <typename T, Norm kNorm, Join kJoin>
void norm_backward(const NormBackward& args) {
  using Acc = acc_t<T>;
  const int64_t rows = args.rows, hidden = args.hidden, blocks = args.partial_rows;
  const int64_t gates = args.gate.per_column ? hidden : 1;
  std::vector<Acc> scales;
  if constexpr (kJoin == Join::kGate) scales = gate_scales<Acc>(args.gate, hidden);
  const auto partial = [](void* partials, int64_t block, int64_t width) {
    Acc* begin = partials == nullptr ? nullptr : static_cast<Acc*>(partials) + block * width;
    if (begin != nullptr) std::fill_n(begin, width, Acc(0));
    return begin;
  };
  const int64_t grain = std::max<int64_t>(1, kNormGrainElements / hidden * blocks / rows);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const NormPartials<Acc> partials{partial(args.weight_partials, block, hidden),
                                       partial(args.bias_partials, block, hidden),
                                       partial(args.gate_partials, block, gates)};
      for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) {
        norm_backward_row<T, kNorm, kJoin>(args, scales.data(), row, partials);
      }
    }
  });
  const auto sum = [&](void* partials, int64_t width, void* total) {
    if (partials != nullptr) {
      sum_rows(static_cast<const Acc*>(partials), blocks, width, static_cast<Acc*>(total));
    }
  };
  sum(args.weight_partials, hidden, args.grad_weight);
  sum(args.bias_partials, hidden, args.grad_bias);
  sum(args.gate_partials, gates, args.grad_gate);
  if constexpr (kJoin == Join::kGate) {
    auto* grad_gate = static_cast<Acc*>(args.grad_gate);
    for (int64_t i = 0; grad_gate != nullptr && i < gates; ++i) grad_gate[i] *= 1 - scales[i] * scales[i];
  }
}

template <Norm kNorm, Join kJoin>
constexpr NormKernels norm_kernels_cpu() {
  // nothing but a gate needs to know in the backward how s was made
  constexpr Join kBackwardJoin = kJoin == Join::kGate ? kJoin : Join::kNone;
  return {[](const NormForward& args, void*) -> const char* {
            dispatch_cpu(args.dtype,
                         [&](auto element) { norm_forward<decltype(element), kNorm, kJoin>(args); });
            return nullptr;
          },
          [](const NormBackward& args, void*) -> const char* {
            dispatch_cpu(args.dtype,
                         [&](auto element) { norm_backward<decltype(element), kNorm, kBackwardJoin>(args); });
            return nullptr;
          },
          norm_partial_rows_cpu};
}

}  // namespace megamm
