// Forward kernels of norm.cuh, which has the math.
#pragma once

#include "norm_row.cuh"

namespace megamm {

template <typename T, int kPackets, Norm kNorm, Join kJoin, bool kColumns>
__global__ void __launch_bounds__(kForwardThreads) norm_forward_packets(const NormForward args) {
  constexpr int kWidth = kPacketWidth<T>;
  const T* __restrict__ x = static_cast<const T*>(args.x);
  const T* __restrict__ branch = static_cast<const T*>(args.branch);
  const int64_t hidden = args.hidden;
  const bool gate_fp32 = args.gate.dtype == DType::kFloat32;
  const bool weight_fp32 = args.weight_dtype == DType::kFloat32;
  float single = 0.0f;
  if constexpr (kJoin == Join::kGate && !kColumns) single = load_scale<T>(args.gate, gate_fp32, 0);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < args.rows;
       row += step) {
    Held<T> held[kPackets];
    for_packets<kPackets, kWidth>(
        hidden, [&](int p, int64_t column) { held[p] = load_held(x + row * args.x_stride + column); });
    if constexpr (kJoin != Join::kNone) {
      T* __restrict__ sum = static_cast<T*>(args.sum) + row * hidden;
      if (kJoin == Join::kAdd || args.gate.keep == nullptr || args.gate.keep[row]) {
        Held<T> updates[kPackets];
        for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t column) {
          updates[p] = load_held(branch + row * args.branch_stride + column);
        });
        for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t column) {
          float values[kWidth], update[kWidth], scales[kWidth];
          unpack(held[p], values);
          unpack(updates[p], update);
          if constexpr (kJoin == Join::kGate) {
            load_scales<T, kColumns>(args.gate, gate_fp32, single, column, scales);
          }
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            values[i] += kJoin == Join::kGate ? scales[i] * update[i] : update[i];
          }
          held[p] = pack<T>(values);
        });
      }
      for_packets<kPackets, kWidth>(hidden,
                                    [&](int p, int64_t column) { store_held(sum + column, held[p]); });
    }
    if constexpr (kNorm == Norm::kNone) continue;
    forget(held);
    float mean = 0.0f, squares = 0.0f;
    if constexpr (kNorm == Norm::kLayer) {
      float total = 0.0f;
      for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t) {
        float values[kWidth];
        unpack(held[p], values);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) total += values[i];
      });
      mean = row_sum(total) / static_cast<float>(hidden);
      forget(held);
    }
    for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t) {
      float values[kWidth];
      unpack(held[p], values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squares += (values[i] - mean) * (values[i] - mean);
    });
    const float rstd = rsqrtf(row_sum(squares) / static_cast<float>(hidden) + static_cast<float>(args.eps));
    if (threadIdx.x == 0) {
      static_cast<float*>(args.rstd)[row] = rstd;
      if constexpr (kNorm == Norm::kLayer) static_cast<float*>(args.mean)[row] = mean;
    }
    T* __restrict__ y = static_cast<T*>(args.y) + row * hidden;
    forget(held);
    for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t column) {
      float values[kWidth], weights[kWidth], biases[kWidth] = {};
      unpack(held[p], values);
      load_parameters<T>(args.weight, weight_fp32, column, weights);
      if constexpr (kNorm == Norm::kLayer) load_parameters<T>(args.bias, weight_fp32, column, biases);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float normed = (values[i] - mean) * rstd * weights[i];
        values[i] = kNorm == Norm::kLayer ? normed + biases[i] : normed;
      }
      store_held(y + column, pack<T>(values));
    });
  }
}

// A column always belongs to the same thread, which therefore may read from `sum` what it wrote.
template <typename T, Norm kNorm, Join kJoin>
__global__ void __launch_bounds__(kPreferredThreads) norm_forward_scalar(const NormForward args) {
  const int64_t hidden = args.hidden;
  const bool gate_fp32 = args.gate.dtype == DType::kFloat32;
  const bool weight_fp32 = args.weight_dtype == DType::kFloat32;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* s = static_cast<const T*>(args.x) + row * args.x_stride;
    if constexpr (kJoin != Join::kNone) {
      const T *x = s, *branch = static_cast<const T*>(args.branch) + row * args.branch_stride;
      T* sum = static_cast<T*>(args.sum) + row * hidden;
      const bool kept = kJoin == Join::kAdd || args.gate.keep == nullptr || args.gate.keep[row];
      for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
        float update = kept ? to_float(branch[i]) : 0.0f;
        if constexpr (kJoin == Join::kGate) update *= load_scale<T>(args.gate, gate_fp32, i);
        sum[i] = kept ? from_float<T>(to_float(x[i]) + update) : x[i];
      }
      s = sum;
    }
    if constexpr (kNorm == Norm::kNone) continue;
    float mean = 0.0f, squares = 0.0f;
    if constexpr (kNorm == Norm::kLayer) {
      float total = 0.0f;
      for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) total += to_float(s[i]);
      mean = row_sum(total) / static_cast<float>(hidden);
    }
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      const float value = to_float(s[i]) - mean;
      squares += value * value;
    }
    const float rstd = rsqrtf(row_sum(squares) / static_cast<float>(hidden) + static_cast<float>(args.eps));
    if (threadIdx.x == 0) {
      static_cast<float*>(args.rstd)[row] = rstd;
      if constexpr (kNorm == Norm::kLayer) static_cast<float*>(args.mean)[row] = mean;
    }
    T* y = static_cast<T*>(args.y) + row * hidden;
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      float out = (to_float(s[i]) - mean) * rstd * load_parameter<T>(args.weight, weight_fp32, i);
      if constexpr (kNorm == Norm::kLayer) out += load_parameter<T>(args.bias, weight_fp32, i);
      y[i] = from_float<T>(out);
    }
  }
}

}  // namespace megamm
