// Cross entropy for CUDA: sm_80 (A100) and sm_90a (H100, H200).
//
// Math, per row of logits x [rows, columns] with label l and weight g = d total / d loss, in fp32, rounded
// once when written; columns that pad the vocabulary count as -inf:
//   statistics   m = max(x)    s = sum(exp(x - m))    x_l    loss = log(s) + m - x_l
//   gradient     g * (exp(x - m) / s - [column is l]), with m and s of the whole vocabulary
// Between the two, processes that hold parts of the vocabulary exchange m, s and x_l (megamm/ops).
//
// Bytes moved, for e bytes per element and T = rows * columns:
//   statistics   T e + 24 rows        x read once
//   gradient     2 T e + 20 rows      x read, the gradient written, in place or not
// A row without loss is not read in either; its gradient is written: T e.
//
// Versions:
//   1. online (this file): a block per row; each thread keeps a maximum and a sum relative to it and reads 4
//      packets of 16 bytes at a time, rescaling its sum at most once for all of them, so that an element
//      costs one exponential (ex2.approx, 2 ulp). exp(x - m) is 2^((x - m) log2 e), not 2^(x log2 e - m log2
//      e), one instruction less, whose rounding error grows with the logits.
//   2. what is not aligned (this file): rows of an odd vocabulary (32003, say) begin anywhere, so every row
//   is
//      split into elements before the first 16-byte boundary, packets, and elements after the last; where
//      input and output differ in that, all elements go one by one.
//   3. thought of and not taken: statistics and gradient in one kernel when the vocabulary is not split,
//   reading
//      the row a second time from the L2 cache. It moves 2 T e instead of 3 T e, but needs the weights g
//      before the backward pass, and next to the matrix products around it the difference is below 5 %.
// Not timed on a GPU so far; compiled for both targets by the tests.
#include <cfloat>

#include "../common/packet.cuh"
#include "cross_entropy.h"

namespace megamm {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kMinThreads = 64;
constexpr int kUnroll = 4;                // packets that a thread reads before it uses them
constexpr int kGradientUnroll = 2;        // fewer, as it also writes, and needs registers for the addresses
constexpr int64_t kMaxGrid = 2147483647;  // of gridDim.x
constexpr float kLog2E = 1.44269504f;

// exp(x) for x <= 0
__device__ __forceinline__ float exp_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * kLog2E));
  return result;
}

// A maximum and the sum of exp(x - maximum), over some elements. Begins with the lowest finite number, so
// that no difference of two infinities arises where there is nothing, or nothing but -inf.
struct Running {
  float maximum = -FLT_MAX;
  float sum = 0.0f;

  __device__ __forceinline__ void raise(float candidate) {
    if (candidate > maximum) {
      sum *= exp_of(maximum - candidate);
      maximum = candidate;
    }
  }
  __device__ __forceinline__ void add(float x) {
    raise(x);
    sum += exp_of(x - maximum);
  }
  __device__ __forceinline__ void merge(float other_maximum, float other_sum) {
    const float larger = fmaxf(maximum, other_maximum);
    sum = sum * exp_of(maximum - larger) + other_sum * exp_of(other_maximum - larger);
    maximum = larger;
  }
};

// How a row of `size` elements is read: `head` single ones, `packets`, then single ones again.
template <typename T>
struct Split {
  static constexpr int kWidth = kPacketWidth<T>;
  int64_t head, packets;

  __device__ __forceinline__ Split(const T* row, int64_t size) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) % kWidth;
    head = past == 0 ? 0 : kWidth - past;
    if (head > size) head = size;
    packets = (size - head) / kWidth;
  }
  // Reading goes by packets only if writing can.
  __device__ __forceinline__ Split(const T* row, const T* out, int64_t size) : Split(row, size) {
    if ((reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(out)) % 16 != 0) {
      head = size;
      packets = 0;
    }
  }
  __device__ __forceinline__ int64_t tail() const { return head + packets * kWidth; }
};

// Joins what the threads of a block have; known to thread 0 afterwards.
__device__ __forceinline__ void merge_threads(Running& running) {
  __shared__ float maxima[kMaxThreads / kWarp], sums[kMaxThreads / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, num_warps = blockDim.x / kWarp;
  const auto merge_warp = [&] {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float maximum = __shfl_xor_sync(0xffffffff, running.maximum, offset);
      const float sum = __shfl_xor_sync(0xffffffff, running.sum, offset);
      running.merge(maximum, sum);
    }
  };
  merge_warp();
  __syncthreads();  // the shares of the previous row have been read
  if (lane == 0) {
    maxima[warp] = running.maximum;
    sums[warp] = running.sum;
  }
  __syncthreads();
  if (warp != 0) return;
  running = Running{};
  if (lane < num_warps) {
    running.maximum = maxima[lane];
    running.sum = sums[lane];
  }
  merge_warp();
}

template <typename T>
__device__ __forceinline__ Running read_row(const T* x, int64_t size) {
  constexpr int kWidth = kPacketWidth<T>;
  const Split<T> split(x, size);
  Running running;
  for (int64_t i = threadIdx.x; i < split.head; i += blockDim.x) running.add(to_float(x[i]));
  for (int64_t i = split.tail() + threadIdx.x; i < size; i += blockDim.x) running.add(to_float(x[i]));
  const T* packets = x + split.head;
  for (int64_t i = threadIdx.x; i < split.packets; i += kUnroll * blockDim.x) {
    Packet<T, kWidth> held[kUnroll];
    float largest = -FLT_MAX;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t packet = i + u * blockDim.x;
      if (packet < split.packets) held[u] = load_packet<kWidth>(packets + packet * kWidth);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * blockDim.x >= split.packets) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) largest = fmaxf(largest, to_float(held[u].values[j]));
    }
    running.raise(largest);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * blockDim.x >= split.packets) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        running.sum += exp_of(to_float(held[u].values[j]) - running.maximum);
      }
    }
  }
  return running;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2) statistics(CrossEntropyArgs args, float* __restrict__ out) {
  const T* logits = static_cast<const T*>(args.logits);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t label = args.labels[row];
    Running running{0.0f, 1.0f};
    float label_logit = 0.0f;
    if (label != args.ignore_index) {  // the same for all threads
      const T* x = logits + row * args.stride;
      running = read_row(x, args.valid);
      merge_threads(running);
      const int64_t column = label - args.vocab_start;
      if (column >= 0 && column < args.valid) label_logit = to_float(x[column]);
      if (label < 0 || label >= args.vocab_size) label_logit = nanf("");
    }
    if (threadIdx.x != 0) continue;
    out[kMaximum * args.rows + row] = running.maximum;
    out[kSum * args.rows + row] = running.sum;
    out[kLabelLogit * args.rows + row] = label_logit;
    out[kLoss * args.rows + row] = logf(running.sum) + (running.maximum - label_logit);
  }
}

// out[begin, size) = 0
template <typename T>
__device__ __forceinline__ void clear(T* out, int64_t begin, int64_t size) {
  constexpr int kWidth = kPacketWidth<T>;
  out += begin;
  size -= begin;
  const Split<T> split(out, size);
  const Packet<T, kWidth> zeros{};
  for (int64_t i = threadIdx.x; i < split.head; i += blockDim.x) out[i] = from_float<T>(0.0f);
  for (int64_t i = split.tail() + threadIdx.x; i < size; i += blockDim.x) out[i] = from_float<T>(0.0f);
  for (int64_t i = threadIdx.x; i < split.packets; i += blockDim.x) {
    store_packet(out + split.head + i * kWidth, zeros);
  }
}

// One row. `out` may be `x`: every element is read and written by the same thread.
template <typename T>
__device__ __forceinline__ void write_gradient(const T* x, T* out, int64_t size, int64_t label_column,
                                               float maximum, float sum, float weight) {
  constexpr int kWidth = kPacketWidth<T>;
  const Split<T> split(x, out, size);
  const float factor = weight / sum;
  const auto single = [&](int64_t i) {
    const float share = exp_of(to_float(x[i]) - maximum) * factor;
    out[i] = from_float<T>(i == label_column ? share - weight : share);
  };
  for (int64_t i = threadIdx.x; i < split.head; i += blockDim.x) single(i);
  for (int64_t i = split.tail() + threadIdx.x; i < size; i += blockDim.x) single(i);
  for (int64_t i = threadIdx.x; i < split.packets; i += kGradientUnroll * blockDim.x) {
    Packet<T, kWidth> held[kGradientUnroll];
#pragma unroll
    for (int u = 0; u < kGradientUnroll; ++u) {
      const int64_t packet = i + u * blockDim.x;
      if (packet < split.packets) held[u] = load_packet<kWidth>(x + split.head + packet * kWidth);
    }
#pragma unroll
    for (int u = 0; u < kGradientUnroll; ++u) {
      const int64_t packet = i + u * blockDim.x;
      if (packet >= split.packets) break;
      const int64_t column = split.head + packet * kWidth;
      const int64_t label_in_packet = label_column - column;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float share = exp_of(to_float(held[u].values[j]) - maximum) * factor;
        held[u].values[j] = from_float<T>(j == label_in_packet ? share - weight : share);
      }
      store_packet(out + column, held[u]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    gradient(CrossEntropyArgs args, const float* __restrict__ statistics, const float* __restrict__ grad_loss,
             T* grad, int64_t grad_stride) {
  const T* logits = static_cast<const T*>(args.logits);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t label = args.labels[row];
    const float weight = grad_loss[row];
    int64_t written = 0;
    if (label != args.ignore_index && weight != 0.0f) {  // the same for all threads
      written = args.valid;
      write_gradient(logits + row * args.stride, grad + row * grad_stride, args.valid,
                     label - args.vocab_start, statistics[kMaximum * args.rows + row],
                     statistics[kSum * args.rows + row], weight);
    }
    if (written < args.columns) clear(grad + row * grad_stride, written, args.columns);
  }
}

// Enough threads to read a row in one go, as far as a block may have them.
template <typename T>
int threads_for(int64_t columns) {
  const int64_t reads = columns / (kPacketWidth<T> * kUnroll);
  int threads = kMinThreads;
  while (threads < kMaxThreads && threads < reads) threads *= 2;
  return threads;
}

unsigned grid_for(int64_t rows) { return static_cast<unsigned>(rows < kMaxGrid ? rows : kMaxGrid); }

}  // namespace

const char* cross_entropy_statistics_cuda(const CrossEntropyStatistics& call, void* stream) {
  const CrossEntropyArgs& args = call.args;
  return dispatch_cuda(args.dtype, [&](auto element) {
    using T = decltype(element);
    statistics<T>
        <<<grid_for(args.rows), threads_for<T>(args.columns), 0, static_cast<cudaStream_t>(stream)>>>(
            args, static_cast<float*>(call.statistics));
  });
}

const char* cross_entropy_gradient_cuda(const CrossEntropyGradient& call, void* stream) {
  const CrossEntropyArgs& args = call.args;
  return dispatch_cuda(args.dtype, [&](auto element) {
    using T = decltype(element);
    gradient<T><<<grid_for(args.rows), threads_for<T>(args.columns), 0, static_cast<cudaStream_t>(stream)>>>(
        args, static_cast<const float*>(call.statistics), static_cast<const float*>(call.grad_loss),
        static_cast<T*>(call.grad), call.grad_stride);
  });
}

}  // namespace megamm
