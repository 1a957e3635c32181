// SwiGLU on the CPU. Math as in kernel.cu.
//
// Rows are cut into stretches of columns, which are dealt out to threads: a few wide rows keep all of them
// busy.
#include <ATen/Parallel.h>

#include <algorithm>

#include "../common/dispatch.h"
#include "../common/vec_exp.h"
#include "swiglu.h"

namespace megamm {
namespace {

constexpr int64_t kStretch = 4096;           // columns
constexpr int64_t kGrainElements = 1 << 14;  // below this a thread costs more than it saves

// Calls body(row, first column, columns) for every stretch of every row.
template <typename Body>
void for_each_stretch(int64_t rows, int64_t width, const Body& body) {
  const int64_t per_row = (width + kStretch - 1) / kStretch;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::min(width, kStretch));
  at::parallel_for(0, rows * per_row, grain, [&](int64_t begin, int64_t end) {
    for (int64_t stretch = begin; stretch < end; ++stretch) {
      const int64_t column = stretch % per_row * kStretch;
      body(stretch / per_row, column, std::min(kStretch, width - column));
    }
  });
}

template <typename T>
void forward(const SwigluForward& args) {
  using Acc = acc_t<T>;
  using Vec = at::vec::Vectorized<Acc>;
  for_each_stretch(args.rows, args.width, [&](int64_t row, int64_t column, int64_t columns) {
    const T* gate = static_cast<const T*>(args.x) + row * args.x_stride + column;
    const T* value = gate + args.width;
    T* y = static_cast<T*>(args.y) + row * args.width + column;
    for_each_pair<Acc>(columns, [&](int64_t i, auto count) {
      const auto silu =
          map(load(gate + i, count), [](const Vec& g) { return g / (Vec(1) + vec_exp(g.neg())); });
      store(y + i, silu * load(value + i, count), count);
    });
  });
}

template <typename T>
void backward(const SwigluBackward& args) {
  using Acc = acc_t<T>;
  const Pair<Acc> one(1);
  for_each_stretch(args.rows, args.width, [&](int64_t row, int64_t column, int64_t columns) {
    const T* grad = static_cast<const T*>(args.grad) + row * args.grad_stride + column;
    const T* gate = static_cast<const T*>(args.x) + row * args.x_stride + column;
    const T* value = gate + args.width;
    T* grad_gate = static_cast<T*>(args.grad_x) + 2 * row * args.width + column;
    T* grad_value = grad_gate + args.width;
    for_each_pair<Acc>(columns, [&](int64_t i, auto count) {
      const auto g = load(gate + i, count), out = load(grad + i, count);
      const auto s = sigmoid(g), silu = g * s;
      store(grad_gate + i, out * load(value + i, count) * (s + silu * (one - s)), count);
      store(grad_value + i, out * silu, count);
    });
  });
}

}  // namespace

void swiglu_forward_cpu(const SwigluForward& args) {
  dispatch_cpu(args.dtype, [&](auto element) { forward<decltype(element)>(args); });
}

void swiglu_backward_cpu(const SwigluBackward& args) {
  dispatch_cpu(args.dtype, [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace megamm
