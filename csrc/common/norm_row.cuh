// What the CUDA kernels of norm.cuh do with a row: sums over its threads, packets in registers, parameters.
#pragma once

#include <type_traits>

#include "norm.h"
#include "packet.cuh"

namespace megamm {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;          // of a warp each, when a warp suffices for a row
constexpr int kForwardThreads = 1024;     // most threads of a block
constexpr int kBackwardThreads = 512;     // fewer, because a thread needs more registers
constexpr int kPreferredThreads = 256;    // more packets per thread are taken to get down to this
constexpr int kThreadsPerSM = 1024;       // what the backward keeps in flight
constexpr int64_t kMaxGrid = 2147483647;  // of gridDim.x

// Sums over the threads of a row (blockDim.x of them), known to all of them afterwards. Every thread of the
// block must call it when a row has more than one warp.
template <int kCount>
__device__ __forceinline__ void row_sum(float (&values)[kCount]) {
  __shared__ float shares[kCount][kWarp];
  const auto warp_sum = [](float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
    return value;
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
  if (blockDim.x == kWarp) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, num_warps = blockDim.x / kWarp;
  __syncthreads();  // the shares of the previous call have been read
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (lane == 0) shares[i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(lane < num_warps ? shares[i][lane] : 0.0f);
}

__device__ __forceinline__ float row_sum(float value) {
  float values[1] = {value};
  row_sum(values);
  return values[0];
}

// An element of a parameter, which is fp32 or T.
template <typename T>
__device__ __forceinline__ float load_parameter(const void* from, bool fp32, int64_t i) {
  return fp32 ? static_cast<const float*>(from)[i] : to_float(static_cast<const T*>(from)[i]);
}

// kWidth elements of a parameter by 16-byte reads; kWidth elements of T are 16 bytes.
template <typename T, int kWidth>
__device__ __forceinline__ void load_parameters(const void* from, bool fp32, int64_t at,
                                                float (&values)[kWidth]) {
  if (fp32) {
    constexpr int kFloats = kPacketWidth<float>;
#pragma unroll
    for (int i = 0; i < kWidth; i += kFloats) {
      const auto packet = load_packet<kFloats>(static_cast<const float*>(from) + at + i);
#pragma unroll
      for (int j = 0; j < kFloats; ++j) values[i + j] = packet.values[j];
    }
  } else {
    const auto packet = load_packet<kWidth>(static_cast<const T*>(from) + at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = to_float(packet.values[i]);
  }
}

// tanh without a branch (tanhf has one, whose barrier is spilled in the larger kernels): its series to x^11
// where 1 - 2 / (exp(2 |x|) + 1) would cancel. Largest relative error 3e-7.
__device__ __forceinline__ float tanh_of(float x) {
  const float square = x * x;
  float series = fmaf(square, -8.8632355e-3f, 2.1869489e-2f);
  series = fmaf(square, series, -5.3968254e-2f);
  series = fmaf(square, series, 0.13333333f);
  series = fmaf(square, series, -0.33333334f);
  series = fmaf(square * x, series, x);
  const float large = copysignf(1.0f - __fdividef(2.0f, expf(2.0f * fabsf(x)) + 1.0f), x);
  return square < 0.09f ? series : large;
}

// tanh of the gates of columns [at, at + kWidth). `single`: that of the single gate, where it is one.
template <typename T, bool kColumns, int kWidth>
__device__ __forceinline__ void load_scales(const Gate& gate, bool fp32, float single, int64_t at,
                                            float (&scales)[kWidth]) {
  if constexpr (kColumns) {
    load_parameters<T>(gate.values, fp32, at, scales);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) scales[i] = tanh_of(scales[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) scales[i] = single;
  }
}

template <typename T>
__device__ __forceinline__ float load_scale(const Gate& gate, bool fp32, int64_t column) {
  return tanh_of(load_parameter<T>(gate.values, fp32, gate.per_column ? column : 0));
}

// 16 bytes of a row as they stand in registers: whole words, because the compiler would spread 16-bit
// elements over one register each.
template <typename T>
struct alignas(16) Held {
  static constexpr int kWidth = kPacketWidth<T>;
  uint32_t words[4];
};

template <typename T>
__device__ __forceinline__ Held<T> load_held(const T* from) {
  return *reinterpret_cast<const Held<T>*>(from);
}

template <typename T>
__device__ __forceinline__ void store_held(T* to, const Held<T>& held) {
  *reinterpret_cast<Held<T>*>(to) = held;
}

template <typename T>
__device__ __forceinline__ void unpack(const Held<T>& held, float (&values)[Held<T>::kWidth]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = held.words[i];
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      values[2 * i] = __uint_as_float(word << 16);
      values[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
    } else {
      values[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
      values[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
    }
  }
}

// Rounds to T.
template <typename T>
__device__ __forceinline__ Held<T> pack(const float (&values)[Held<T>::kWidth]) {
  Held<T> held;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      held.words[i] = __float_as_uint(values[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      held.words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
      held.words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  return held;
}

// Makes the compiler forget the floats that it got from `held`: it would keep them for the next use, in twice
// the registers for 16-bit elements, where converting again costs an instruction.
template <typename T, int kPackets>
__device__ __forceinline__ void forget(Held<T> (&held)[kPackets]) {
  if constexpr (sizeof(T) < 4) {
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(held[p].words[i]));
    }
  }
}

// Calls body(p, column) for the packets of a thread that lie in the row.
template <int kPackets, int kWidth, typename Body>
__device__ __forceinline__ void for_packets(int64_t hidden, const Body& body) {
#pragma unroll
  for (int p = 0; p < kPackets; ++p) {
    const int64_t column = static_cast<int64_t>(p * blockDim.x + threadIdx.x) * kWidth;
    if (column < hidden) body(p, column);
  }
}

}  // namespace megamm
