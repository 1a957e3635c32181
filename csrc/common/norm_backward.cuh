// Backward kernels of norm.cuh, which has the math.
#pragma once

#include "norm_row.cuh"

namespace megamm {

// kSums: sums over rows are kept, and each row of threads writes its share to those partials that are not
// null.
template <typename T, int kPackets, Norm kNorm, Join kJoin, bool kColumns, bool kSums>
__global__ void __launch_bounds__(kBackwardThreads) norm_backward_packets(const NormBackward args) {
  constexpr int kWidth = kPacketWidth<T>;
  constexpr bool kHasNorm = kNorm != Norm::kNone, kGated = kJoin == Join::kGate;
  constexpr int kWeightPackets = kSums && kHasNorm ? kPackets : 1;
  constexpr int kBiasPackets = kSums && kNorm == Norm::kLayer ? kPackets : 1;
  constexpr int kGatePackets = kSums && kGated && kColumns ? kPackets : 1;
  const T* __restrict__ s = static_cast<const T*>(args.s);
  const T* __restrict__ grad = static_cast<const T*>(args.grad);
  const T* __restrict__ grad_sum = static_cast<const T*>(args.grad_sum);
  const T* __restrict__ branch = static_cast<const T*>(args.branch);
  T* __restrict__ grad_x = static_cast<T*>(args.grad_x);
  T* __restrict__ grad_branch = static_cast<T*>(args.grad_branch);
  const int64_t hidden = args.hidden;
  const bool gate_fp32 = args.gate.dtype == DType::kFloat32;
  const bool weight_fp32 = args.weight_dtype == DType::kFloat32;
  const bool need_gate = kGated && kSums && args.gate_partials != nullptr;
  float single = 0.0f, gate_total = 0.0f;
  if constexpr (kGated && !kColumns) single = load_scale<T>(args.gate, gate_fp32, 0);
  float weight_sums[kWeightPackets][kWidth] = {}, bias_sums[kBiasPackets][kWidth] = {};
  float gate_sums[kGatePackets][kWidth] = {};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = first; row < args.rows; row += step) {
    const bool kept = kGated && (args.gate.keep == nullptr || args.gate.keep[row]);
    Held<T> s_held[kPackets], grad_held[kPackets], sum_held[kPackets], branch_held[kPackets];
    for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t column) {
      if constexpr (kHasNorm) {
        s_held[p] = load_held(s + row * args.s_stride + column);
        grad_held[p] = load_held(grad + row * args.grad_stride + column);
      }
      // without a norm, and with the row not kept, nothing of the gradient is used
      if (kHasNorm ? grad_sum != nullptr : kept) {
        sum_held[p] = load_held(grad_sum + row * args.grad_sum_stride + column);
      }
      if constexpr (kGated) {
        if (kept && need_gate) {
          branch_held[p] = load_held(branch + row * args.branch_stride + column);
        }
      }
    });
    float mean = 0.0f, rstd = 0.0f, means[2] = {};  // means: c2, c1
    if constexpr (kHasNorm) {
      rstd = static_cast<const float*>(args.rstd)[row];
      if constexpr (kNorm == Norm::kLayer) mean = static_cast<const float*>(args.mean)[row];
      for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t column) {
        float values[kWidth], grads[kWidth], weights[kWidth];
        unpack(s_held[p], values);
        unpack(grad_held[p], grads);
        load_parameters<T>(args.weight, weight_fp32, column, weights);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float product = grads[i] * (values[i] - mean) * rstd;
          means[0] += product * weights[i];
          if constexpr (kNorm == Norm::kLayer) means[1] += grads[i] * weights[i];
          if constexpr (kSums) weight_sums[p][i] += product;
          if constexpr (kSums && kNorm == Norm::kLayer) bias_sums[p][i] += grads[i];
        }
      });
      if (grad_x == nullptr) continue;  // the same for all threads: nobody waits in row_sum
      if constexpr (kNorm == Norm::kLayer) {
        row_sum(means);
      } else {
        means[0] = row_sum(means[0]);
      }
      means[0] *= rstd / static_cast<float>(hidden);
      means[1] /= static_cast<float>(hidden);
      forget(s_held);
      forget(grad_held);
    }
    for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t column) {
      float grads[kWidth] = {};  // of s
      if constexpr (kHasNorm) {
        float values[kWidth], weights[kWidth];
        unpack(s_held[p], values);
        unpack(grad_held[p], grads);
        load_parameters<T>(args.weight, weight_fp32, column, weights);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          grads[i] = rstd * (grads[i] * weights[i] - means[1] - (values[i] - mean) * means[0]);
        }
        if (grad_sum != nullptr) {
          unpack(sum_held[p], values);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) grads[i] += values[i];
        }
        store_held(grad_x + row * hidden + column, pack<T>(grads));
      } else {
        if (kept) unpack(sum_held[p], grads);
      }
      if constexpr (kGated) {
        if (kept && need_gate) {
          float values[kWidth];
          unpack(branch_held[p], values);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            if constexpr (kColumns && kSums) {
              gate_sums[p][i] += grads[i] * values[i];
            } else {
              gate_total += grads[i] * values[i];
            }
          }
        }
        if (grad_branch != nullptr) {
          float scales[kWidth];
          load_scales<T, kColumns>(args.gate, gate_fp32, single, column, scales);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) grads[i] = kept ? grads[i] * scales[i] : 0.0f;
          store_held(grad_branch + row * hidden + column, pack<T>(grads));
        }
      }
    });
  }
  if constexpr (kSums) {
    const auto write = [&](void* partials, const auto& sums) {
      if (partials == nullptr) return;
      for_packets<kPackets, kWidth>(hidden, [&](int p, int64_t column) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          static_cast<float*>(partials)[first * hidden + column + i] = sums[p][i];
        }
      });
    };
    if constexpr (kHasNorm) write(args.weight_partials, weight_sums);
    if constexpr (kNorm == Norm::kLayer) write(args.bias_partials, bias_sums);
    if constexpr (kGated && kColumns) write(args.gate_partials, gate_sums);
    if constexpr (kGated && !kColumns) {
      gate_total = row_sum(gate_total);
      if (need_gate && threadIdx.x == 0) static_cast<float*>(args.gate_partials)[first] = gate_total;
    }
  }
}

// A column always belongs to the same thread, which therefore may add to partials in memory.
template <typename T, Norm kNorm, Join kJoin>
__global__ void __launch_bounds__(kPreferredThreads) norm_backward_scalar(const NormBackward args) {
  constexpr bool kHasNorm = kNorm != Norm::kNone, kGated = kJoin == Join::kGate;
  const int64_t hidden = args.hidden;
  const bool gate_fp32 = args.gate.dtype == DType::kFloat32;
  const bool weight_fp32 = args.weight_dtype == DType::kFloat32;
  const auto partials_of = [&](void* partials) {
    float* begin = static_cast<float*>(partials);
    if (begin == nullptr) return begin;
    begin += blockIdx.x * hidden;
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) begin[i] = 0.0f;
    return begin;
  };
  float* weight_sums = partials_of(args.weight_partials);
  float* bias_sums = partials_of(args.bias_partials);
  float* gate_sums = args.gate.per_column ? partials_of(args.gate_partials) : nullptr;
  float gate_total = 0.0f;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* grad_sum = static_cast<const T*>(args.grad_sum);
    if (grad_sum != nullptr) grad_sum += row * args.grad_sum_stride;
    const T* s = static_cast<const T*>(args.s) + (kHasNorm ? row * args.s_stride : 0);
    const T* grad = static_cast<const T*>(args.grad) + (kHasNorm ? row * args.grad_stride : 0);
    float mean = 0.0f, rstd = 0.0f, means[2] = {};  // means: c2, c1
    if constexpr (kHasNorm) {
      rstd = static_cast<const float*>(args.rstd)[row];
      if constexpr (kNorm == Norm::kLayer) mean = static_cast<const float*>(args.mean)[row];
      for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
        const float value = to_float(grad[i]), weight = load_parameter<T>(args.weight, weight_fp32, i);
        const float product = value * (to_float(s[i]) - mean) * rstd;
        means[0] += product * weight;
        means[1] += value * weight;
        if (weight_sums != nullptr) weight_sums[i] += product;
        if (bias_sums != nullptr) bias_sums[i] += value;
      }
      if (args.grad_x == nullptr) continue;
      row_sum(means);
      means[0] *= rstd / static_cast<float>(hidden);
      means[1] = kNorm == Norm::kLayer ? means[1] / static_cast<float>(hidden) : 0.0f;
    }
    const bool kept = kGated && (args.gate.keep == nullptr || args.gate.keep[row]);
    const T* branch = static_cast<const T*>(args.branch);
    if (branch != nullptr) branch += row * args.branch_stride;
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      float value = grad_sum == nullptr ? 0.0f : to_float(grad_sum[i]);
      if constexpr (kHasNorm) {
        const float weighted = to_float(grad[i]) * load_parameter<T>(args.weight, weight_fp32, i) - means[1];
        value += rstd * (weighted - (to_float(s[i]) - mean) * means[0]);
        static_cast<T*>(args.grad_x)[row * hidden + i] = from_float<T>(value);
      }
      if constexpr (kGated) {
        const float scale = kept ? load_scale<T>(args.gate, gate_fp32, i) : 0.0f;
        if (args.grad_branch != nullptr) {
          static_cast<T*>(args.grad_branch)[row * hidden + i] = from_float<T>(kept ? value * scale : 0.0f);
        }
        if (kept && branch != nullptr) {
          const float product = value * to_float(branch[i]);
          if (gate_sums != nullptr) {
            gate_sums[i] += product;
          } else {
            gate_total += product;
          }
        }
      }
    }
  }
  if constexpr (kGated) {
    gate_total = row_sum(gate_total);
    if (args.gate_partials != nullptr && gate_sums == nullptr && threadIdx.x == 0) {
      static_cast<float*>(args.gate_partials)[blockIdx.x] = gate_total;
    }
  }
}

// A gradient that is the sum of its partial rows; null partials: not wanted.
struct PartialSum {
  const float* partials;  // [partial_rows, width]
  void* total;            // [width]
  const void* gate;       // [width]; the sum is multiplied by 1 - tanh^2 of it; null: it is not
  int64_t width;
  bool fp32;  // total and gate; else T
};

struct PartialSums {
  PartialSum each[3];  // weight, bias, gate
};

// Adds up partial rows in a fixed order. A block has 32 columns and 32 threads for each.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarp) sum_partials(const PartialSums sums, int64_t partial_rows) {
  __shared__ float shares[kWarp][kWarp + 1];
  // picked by conditions: an index known only at run time would copy the argument to local memory
  PartialSum sum = sums.each[0];
  if (blockIdx.y == 1) sum = sums.each[1];
  if (blockIdx.y == 2) sum = sums.each[2];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const bool wanted = sum.partials != nullptr && column < sum.width;
  float total = 0.0f;
  if (wanted) {
    for (int64_t row = threadIdx.y; row < partial_rows; row += kWarp) {
      total += sum.partials[row * sum.width + column];
    }
  }
  shares[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || !wanted) return;
  for (int i = 1; i < kWarp; ++i) total += shares[i][threadIdx.x];
  if (sum.gate != nullptr) {
    const float scale = tanh_of(load_parameter<T>(sum.gate, sum.fp32, column));
    total *= 1.0f - scale * scale;
  }
  if (sum.fp32) {
    static_cast<float*>(sum.total)[column] = total;
  } else {
    static_cast<T*>(sum.total)[column] = from_float<T>(total);
  }
}

}  // namespace megamm
