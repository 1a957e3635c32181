// RMSNorm for CUDA: sm_80 (A100) and sm_90a (H100, H200).
//
// Math, per row of x [rows, hidden], in fp32, rounded once when written:
//   rstd   = 1 / sqrt(sum(x^2) / hidden + eps)                y = x * rstd * weight
//   grad_x = rstd * (grad * weight - x * rstd * c)            c = sum(grad * weight * x * rstd) / hidden
//   grad_weight = sum over rows of grad * x * rstd
//
// Bytes moved, for e bytes per element and T = rows * hidden:
//   forward   2 T e + 4 rows          x read, y written, rstd written
//   backward  3 T e + 4 rows          x and grad read, grad_x written; the partial weight gradients add
//                                     8 * partial_rows * hidden, which does not grow with the rows
//
// Versions:
//   1. packets (this file): a row is held in registers as 16-byte packets, so it is read once; a block per
//   row,
//      or a warp per row and four rows per block when 32 packets suffice. Backward: a grid that stays on the
//      device and walks over the rows; each thread keeps its columns' share of grad_weight in registers and
//      writes it once, a second kernel sums the shares in a fixed order (no atomics: runs are reproducible).
//   2. scalar (this file): element by element and two passes, for rows that are not 16-byte aligned or too
//   long
//      for registers.
// Not timed on a GPU so far; compiled for both targets by the tests.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "rms_norm.h"

namespace megamm {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;          // of a warp each, when a warp suffices for a row
constexpr int kForwardThreads = 1024;     // most threads of a block
constexpr int kBackwardThreads = 512;     // fewer, because a thread needs more registers
constexpr int kPreferredThreads = 256;    // more packets per thread are taken to get down to this
constexpr int kThreadsPerSM = 1024;       // what the backward keeps in flight
constexpr int64_t kMaxGrid = 2147483647;  // of gridDim.x

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// What one 16-byte access moves.
template <typename T>
struct alignas(16) Packet {
  static constexpr int kWidth = 16 / sizeof(T);
  T values[kWidth];
};

template <typename T>
__device__ __forceinline__ Packet<T> load_packet(const T* from) {
  return *reinterpret_cast<const Packet<T>*>(from);
}

template <typename T>
__device__ __forceinline__ void store_packet(T* to, const Packet<T>& packet) {
  *reinterpret_cast<Packet<T>*>(to) = packet;
}

// kCount weights as floats, by 16-byte reads.
template <int kCount, typename W>
__device__ __forceinline__ void load_weights(const W* from, float (&weights)[kCount]) {
  constexpr int kWidth = Packet<W>::kWidth;
  static_assert(kCount % kWidth == 0, "a weight is no narrower than an element of x");
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) {
    const Packet<W> packet = load_packet(from + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) weights[i + j] = to_float(packet.values[j]);
  }
}

// Sum over the threads of a row (blockDim.x of them), known to all of them afterwards. Every thread of the
// block must call it when a row has more than one warp.
__device__ __forceinline__ float row_sum(float value) {
  __shared__ float shares[kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
  if (blockDim.x == kWarp) return value;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, num_warps = blockDim.x / kWarp;
  __syncthreads();  // the shares of the previous call have been read
  if (lane == 0) shares[warp] = value;
  __syncthreads();
  value = lane < num_warps ? shares[lane] : 0.0f;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
  return value;
}

template <typename T, typename W, int kPackets>
__global__ void __launch_bounds__(kForwardThreads)
    forward_packets(const T* __restrict__ x, int64_t x_stride, const W* __restrict__ weight,
                    T* __restrict__ y, float* __restrict__ rstd, int64_t rows, int64_t hidden, float eps) {
  constexpr int kWidth = Packet<T>::kWidth;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += step) {
    Packet<T> held[kPackets];
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int64_t column = static_cast<int64_t>(p * blockDim.x + threadIdx.x) * kWidth;
      if (column < hidden) held[p] = load_packet(x + row * x_stride + column);
    }
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int64_t column = static_cast<int64_t>(p * blockDim.x + threadIdx.x) * kWidth;
      if (column >= hidden) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = to_float(held[p].values[i]);
        squares += value * value;
      }
    }
    const float scale = rsqrtf(row_sum(squares) / static_cast<float>(hidden) + eps);
    if (threadIdx.x == 0) rstd[row] = scale;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int64_t column = static_cast<int64_t>(p * blockDim.x + threadIdx.x) * kWidth;
      if (column >= hidden) continue;
      float weights[kWidth];
      load_weights(weight + column, weights);
      Packet<T> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        out.values[i] = from_float<T>(to_float(held[p].values[i]) * scale * weights[i]);
      }
      store_packet(y + row * hidden + column, out);
    }
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kForwardThreads)
    forward_scalar(const T* __restrict__ x, int64_t x_stride, const W* __restrict__ weight, T* __restrict__ y,
                   float* __restrict__ rstd, int64_t rows, int64_t hidden, float eps) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x_row = x + row * x_stride;
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      const float value = to_float(x_row[i]);
      squares += value * value;
    }
    const float scale = rsqrtf(row_sum(squares) / static_cast<float>(hidden) + eps);
    if (threadIdx.x == 0) rstd[row] = scale;
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      y[row * hidden + i] = from_float<T>(to_float(x_row[i]) * scale * to_float(weight[i]));
    }
  }
}

// kSums: also write each row of threads' share of grad_weight to partials. grad_x may be null.
template <typename T, typename W, int kPackets, bool kSums>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_packets(const T* __restrict__ grad, int64_t grad_stride, const T* __restrict__ x,
                     int64_t x_stride, const W* __restrict__ weight, const float* __restrict__ rstd,
                     T* __restrict__ grad_x, float* __restrict__ partials, int64_t rows, int64_t hidden) {
  constexpr int kWidth = Packet<T>::kWidth;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  float sums[kSums ? kPackets : 1][kWidth] = {};
  for (int64_t row = first; row < rows; row += step) {
    Packet<T> x_held[kPackets], grad_held[kPackets];
    const float scale = rstd[row];
    float products = 0.0f;
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int64_t column = static_cast<int64_t>(p * blockDim.x + threadIdx.x) * kWidth;
      if (column >= hidden) continue;
      x_held[p] = load_packet(x + row * x_stride + column);
      grad_held[p] = load_packet(grad + row * grad_stride + column);
    }
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int64_t column = static_cast<int64_t>(p * blockDim.x + threadIdx.x) * kWidth;
      if (column >= hidden) continue;
      float weights[kWidth];
      load_weights(weight + column, weights);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float product = to_float(grad_held[p].values[i]) * to_float(x_held[p].values[i]) * scale;
        products += product * weights[i];
        if constexpr (kSums) sums[p][i] += product;
      }
    }
    if (grad_x == nullptr) continue;  // the same for all threads: nobody waits in row_sum
    const float along_x = scale * row_sum(products) / static_cast<float>(hidden);
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int64_t column = static_cast<int64_t>(p * blockDim.x + threadIdx.x) * kWidth;
      if (column >= hidden) continue;
      float weights[kWidth];
      load_weights(weight + column, weights);
      Packet<T> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float weighted = to_float(grad_held[p].values[i]) * weights[i];
        out.values[i] = from_float<T>(scale * (weighted - to_float(x_held[p].values[i]) * along_x));
      }
      store_packet(grad_x + row * hidden + column, out);
    }
  }
  if constexpr (kSums) {
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int64_t column = static_cast<int64_t>(p * blockDim.x + threadIdx.x) * kWidth;
      if (column >= hidden) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) partials[first * hidden + column + i] = sums[p][i];
    }
  }
}

// A column always belongs to the same thread, so it may add to `partials` in memory.
template <typename T, typename W>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_scalar(const T* __restrict__ grad, int64_t grad_stride, const T* __restrict__ x,
                    int64_t x_stride, const W* __restrict__ weight, const float* __restrict__ rstd,
                    T* __restrict__ grad_x, float* __restrict__ partials, int64_t rows, int64_t hidden) {
  if (partials != nullptr) {
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) partials[blockIdx.x * hidden + i] = 0.0f;
  }
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T *x_row = x + row * x_stride, *grad_row = grad + row * grad_stride;
    const float scale = rstd[row];
    float products = 0.0f;
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      const float product = to_float(grad_row[i]) * to_float(x_row[i]) * scale;
      products += product * to_float(weight[i]);
      if (partials != nullptr) partials[blockIdx.x * hidden + i] += product;
    }
    if (grad_x == nullptr) continue;
    const float along_x = scale * row_sum(products) / static_cast<float>(hidden);
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      const float weighted = to_float(grad_row[i]) * to_float(weight[i]);
      grad_x[row * hidden + i] = from_float<T>(scale * (weighted - to_float(x_row[i]) * along_x));
    }
  }
}

// grad_weight = sum of the partial rows, in a fixed order. A block has 32 columns and 32 threads for each.
template <typename W>
__global__ void __launch_bounds__(kWarp* kWarp)
    sum_partials(const float* __restrict__ partials, int64_t partial_rows, int64_t hidden,
                 W* __restrict__ grad_weight) {
  __shared__ float shares[kWarp][kWarp + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (column < hidden) {
    for (int64_t row = threadIdx.y; row < partial_rows; row += kWarp) sum += partials[row * hidden + column];
  }
  shares[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= hidden) return;
  for (int i = 1; i < kWarp; ++i) sum += shares[i][threadIdx.x];
  grad_weight[column] = from_float<W>(sum);
}

// How a row is dealt out to threads.
struct Plan {
  int packets;  // per thread; 0: the row does not fit
  int threads;  // per row
  int rows;     // per block
};

Plan make_plan(int64_t hidden, int width, int max_packets, int max_threads) {
  const int64_t row_packets = (hidden + width - 1) / width;
  for (int packets = 1; packets <= max_packets; packets *= 2) {
    const int64_t threads = (row_packets + packets * kWarp - 1) / (packets * kWarp) * kWarp;
    if (threads <= (packets < max_packets ? kPreferredThreads : max_threads)) {
      return {packets, static_cast<int>(threads), threads == kWarp ? kRowsPerBlock : 1};
    }
  }
  return {0, kPreferredThreads, 1};
}

template <typename T>
Plan forward_plan(int64_t hidden) {
  return make_plan(hidden, Packet<T>::kWidth, 8, kForwardThreads);
}

template <typename T>
Plan backward_plan(int64_t hidden) {
  return make_plan(hidden, Packet<T>::kWidth, 4, kBackwardThreads);
}

template <typename T>
bool rows_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % Packet<T>::kWidth == 0;
}

template <typename T, typename W>
void launch_forward(const RmsNormForward& args, cudaStream_t stream) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const W*>(args.weight);
  auto* y = static_cast<T*>(args.y);
  auto* rstd = static_cast<float*>(args.rstd);
  const float eps = static_cast<float>(args.eps);
  const Plan plan = forward_plan<T>(args.hidden);
  const bool aligned =
      rows_aligned<T>(x, args.x_stride) && rows_aligned<T>(y, args.hidden) && rows_aligned<W>(weight, 0);
  const auto launch = [&](auto kernel, dim3 block) {
    const int64_t blocks = (args.rows + block.y - 1) / block.y;
    kernel<<<static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid), block, 0, stream>>>(
        x, args.x_stride, weight, y, rstd, args.rows, args.hidden, eps);
  };
  const dim3 block(plan.threads, plan.rows);
  switch (aligned ? plan.packets : 0) {
    case 1:
      return launch(forward_packets<T, W, 1>, block);
    case 2:
      return launch(forward_packets<T, W, 2>, block);
    case 4:
      return launch(forward_packets<T, W, 4>, block);
    case 8:
      return launch(forward_packets<T, W, 8>, block);
    default:
      return launch(forward_scalar<T, W>, dim3(kPreferredThreads));
  }
}

template <typename T, typename W>
void launch_backward(const RmsNormBackward& args, cudaStream_t stream) {
  const auto* grad = static_cast<const T*>(args.grad);
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const W*>(args.weight);
  auto* grad_x = static_cast<T*>(args.grad_x);
  auto* partials = static_cast<float*>(args.partials);
  const Plan plan = backward_plan<T>(args.hidden);
  const bool aligned = rows_aligned<T>(x, args.x_stride) && rows_aligned<T>(grad, args.grad_stride) &&
                       rows_aligned<T>(grad_x, args.hidden) && rows_aligned<W>(weight, 0);
  const auto launch = [&](auto kernel, dim3 block) {
    const unsigned blocks = static_cast<unsigned>(args.partial_rows / block.y);
    kernel<<<blocks, block, 0, stream>>>(grad, args.grad_stride, x, args.x_stride, weight,
                                         static_cast<const float*>(args.rstd), grad_x, partials, args.rows,
                                         args.hidden);
  };
  const dim3 block(plan.threads, plan.rows);
  const bool sums = partials != nullptr;
  switch (aligned ? plan.packets : 0) {
    case 1:
      sums ? launch(backward_packets<T, W, 1, true>, block) : launch(backward_packets<T, W, 1, false>, block);
      break;
    case 2:
      sums ? launch(backward_packets<T, W, 2, true>, block) : launch(backward_packets<T, W, 2, false>, block);
      break;
    case 4:
      sums ? launch(backward_packets<T, W, 4, true>, block) : launch(backward_packets<T, W, 4, false>, block);
      break;
    default:
      launch(backward_scalar<T, W>, dim3(kPreferredThreads));
  }
  if (!sums) return;
  const unsigned blocks = static_cast<unsigned>((args.hidden + kWarp - 1) / kWarp);
  sum_partials<W><<<blocks, dim3(kWarp, kWarp), 0, stream>>>(partials, args.partial_rows, args.hidden,
                                                             static_cast<W*>(args.grad_weight));
}

// Calls run(T{}, W{}) with the element types of x and weight; false if there is no kernel for them.
template <typename Run>
bool dispatch(DType dtype, DType weight_dtype, const Run& run) {
  const bool weight_fp32 = weight_dtype == DType::kFloat32;
  if (!weight_fp32 && weight_dtype != dtype) return false;
  switch (dtype) {
    case DType::kFloat32:
      run(float{}, float{});
      return true;
    case DType::kFloat16:
      weight_fp32 ? run(__half{}, float{}) : run(__half{}, __half{});
      return true;
    case DType::kBFloat16:
      weight_fp32 ? run(__nv_bfloat16{}, float{}) : run(__nv_bfloat16{}, __nv_bfloat16{});
      return true;
    default:
      return false;
  }
}

template <typename Run>
const char* launch_checked(DType dtype, DType weight_dtype, const Run& run) {
  if (!dispatch(dtype, weight_dtype, run)) return "no CUDA kernel for these dtypes of x and weight";
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* rms_norm_forward_cuda(const RmsNormForward& args, void* stream) {
  return launch_checked(args.dtype, args.weight_dtype, [&](auto element, auto weight) {
    launch_forward<decltype(element), decltype(weight)>(args, static_cast<cudaStream_t>(stream));
  });
}

const char* rms_norm_backward_cuda(const RmsNormBackward& args, void* stream) {
  return launch_checked(args.dtype, args.weight_dtype, [&](auto element, auto weight) {
    launch_backward<decltype(element), decltype(weight)>(args, static_cast<cudaStream_t>(stream));
  });
}

int64_t rms_norm_partial_rows_cuda(int64_t rows, int64_t hidden, DType dtype) {
  int device = 0, num_multiprocessors = 1;  // if the device cannot be asked, the launch will report it
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const Plan plan = dtype == DType::kFloat32 ? backward_plan<float>(hidden) : backward_plan<__half>(hidden);
  const int64_t resident = int64_t{num_multiprocessors} * (kThreadsPerSM / (plan.threads * plan.rows));
  const int64_t blocks = (rows + plan.rows - 1) / plan.rows;
  return (blocks < resident ? blocks : resident) * plan.rows;
}

}  // namespace megamm
