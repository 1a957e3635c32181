// SwiGLU for CUDA: sm_80 (A100) and sm_90a (H100, H200).
//
// Math, per element of a row of x [rows, 2 * width] = gate | value, in fp32, rounded once when written:
//   s = 1 / (1 + exp(-gate))                  y = gate * s * value
//   grad_gate = grad * value * s * (1 + gate * (1 - s))          grad_value = grad * gate * s
// s is computed again in the backward pass: x is all that is kept, y need not be.
//
// Bytes moved, for e bytes per element and T = rows * width:
//   forward   3 T e          x (two halves) read, y written
//   backward  5 T e          x and grad read, grad_x (two halves) written
//
// Versions:
//   1. packets (this file, kWidth 8 or 4): a thread owns a column of 16-byte packets and takes kRows rows at
//      a time, with all their loads before the first use; no division of an index anywhere. 16-bit types take
//      the hardware's approximate exponential, whose error is far below their rounding, fp32 the accurate
//      one.
//   2. scalar (the same code with kWidth 1), for rows that are not 16-byte aligned.
// Not timed on a GPU so far; compiled for both targets by the tests.
#include <type_traits>

#include "../common/packet.cuh"
#include "swiglu.h"

namespace megamm {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 2;  // that a thread has in flight
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

// 0 where exp(-x) is above 2^126. An exact division would call a subroutine and cost a stack.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  const float e = std::is_same_v<T, float> ? expf(-x) : __expf(-x);
  return __fdividef(1.0f, 1.0f + e);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ x, int64_t x_stride, T* __restrict__ y, int64_t rows, int64_t width) {
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y * kRows;
  const int64_t column_step = static_cast<int64_t>(gridDim.y) * blockDim.x * kWidth;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * blockDim.y * kRows + threadIdx.y;
  for (int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
       column < width; column += column_step) {
    for (int64_t row = first_row; row < rows; row += row_step) {
      Packet<T, kWidth> gate[kRows], value[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = row + r * blockDim.y;
        if (at >= rows) continue;
        gate[r] = load_packet<kWidth>(x + at * x_stride + column);
        value[r] = load_packet<kWidth>(x + at * x_stride + width + column);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = row + r * blockDim.y;
        if (at >= rows) continue;
        Packet<T, kWidth> out;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float g = to_float(gate[r].values[i]);
          out.values[i] = from_float<T>(g * sigmoid<T>(g) * to_float(value[r].values[i]));
        }
        store_packet(y + at * width + column, out);
      }
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    backward(const T* __restrict__ grad, int64_t grad_stride, const T* __restrict__ x, int64_t x_stride,
             T* __restrict__ grad_x, int64_t rows, int64_t width) {
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y * kRows;
  const int64_t column_step = static_cast<int64_t>(gridDim.y) * blockDim.x * kWidth;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * blockDim.y * kRows + threadIdx.y;
  for (int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
       column < width; column += column_step) {
    for (int64_t row = first_row; row < rows; row += row_step) {
      Packet<T, kWidth> gate[kRows], value[kRows], out[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = row + r * blockDim.y;
        if (at >= rows) continue;
        gate[r] = load_packet<kWidth>(x + at * x_stride + column);
        value[r] = load_packet<kWidth>(x + at * x_stride + width + column);
        out[r] = load_packet<kWidth>(grad + at * grad_stride + column);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = row + r * blockDim.y;
        if (at >= rows) continue;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float g = to_float(gate[r].values[i]), d = to_float(out[r].values[i]);
          const float s = sigmoid<T>(g), silu = g * s;
          gate[r].values[i] = from_float<T>(d * to_float(value[r].values[i]) * (s + silu * (1.0f - s)));
          value[r].values[i] = from_float<T>(d * silu);
        }
        store_packet(grad_x + 2 * at * width + column, gate[r]);
        store_packet(grad_x + (2 * at + 1) * width + column, value[r]);
      }
    }
  }
}

// How many threads stand side by side in a row, and one on top of another; and the grid for them.
struct Plan {
  dim3 grid, block;
};

Plan make_plan(int64_t rows, int64_t row_packets) {
  unsigned threads = 1;
  while (threads < kThreads && threads < row_packets) threads *= 2;
  const unsigned stacked = kThreads / threads;
  const int64_t columns = (row_packets + threads - 1) / threads;
  const int64_t tiles = (rows + stacked * kRows - 1) / (stacked * kRows);
  return {dim3(static_cast<unsigned>(tiles < kMaxGridX ? tiles : kMaxGridX),
               static_cast<unsigned>(columns < kMaxGridY ? columns : kMaxGridY)),
          dim3(threads, stacked)};
}

// Whether all rows of all halves can be read 16 bytes at a time.
template <typename T>
bool rows_aligned(int64_t width, int64_t x_stride, const void* x) {
  return width % kPacketWidth<T> == 0 && x_stride % kPacketWidth<T> == 0 && is_aligned(x);
}

template <typename T>
void launch_forward(const SwigluForward& args, cudaStream_t stream) {
  const bool wide = rows_aligned<T>(args.width, args.x_stride, args.x) && is_aligned(args.y);
  const auto launch = [&](auto kernel, int width) {
    const Plan plan = make_plan(args.rows, args.width / width);
    kernel<<<plan.grid, plan.block, 0, stream>>>(static_cast<const T*>(args.x), args.x_stride,
                                                 static_cast<T*>(args.y), args.rows, args.width);
  };
  constexpr int kWidth = kPacketWidth<T>;
  wide ? launch(forward<T, kWidth>, kWidth) : launch(forward<T, 1>, 1);
}

template <typename T>
void launch_backward(const SwigluBackward& args, cudaStream_t stream) {
  const bool wide = rows_aligned<T>(args.width, args.x_stride, args.x) &&
                    rows_aligned<T>(args.width, args.grad_stride, args.grad) && is_aligned(args.grad_x);
  const auto launch = [&](auto kernel, int width) {
    const Plan plan = make_plan(args.rows, args.width / width);
    kernel<<<plan.grid, plan.block, 0, stream>>>(static_cast<const T*>(args.grad), args.grad_stride,
                                                 static_cast<const T*>(args.x), args.x_stride,
                                                 static_cast<T*>(args.grad_x), args.rows, args.width);
  };
  constexpr int kWidth = kPacketWidth<T>;
  wide ? launch(backward<T, kWidth>, kWidth) : launch(backward<T, 1>, 1);
}

}  // namespace

const char* swiglu_forward_cuda(const SwigluForward& args, void* stream) {
  return dispatch_cuda(args.dtype, [&](auto element) {
    launch_forward<decltype(element)>(args, static_cast<cudaStream_t>(stream));
  });
}

const char* swiglu_backward_cuda(const SwigluBackward& args, void* stream) {
  return dispatch_cuda(args.dtype, [&](auto element) {
    launch_backward<decltype(element)>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace megamm
