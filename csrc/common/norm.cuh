// The CUDA kernels of norm.h, as templates, for sm_80 (A100) and sm_90a (H100, H200). Free of torch headers.
//
// Math, per row, in fp32, rounded once when written; s and y as in norm.h, h = (s - mean) * rstd or s * rstd:
//   grad_s      = rstd * (grad * weight - c1 - h * c2) + grad_sum
//                 c2 = mean(grad * weight * h)     c1 = mean(grad * weight), 0 without a mean
//   grad_branch = tanh(gate) * grad_s              0 where keep is false, and grad_x = grad_s
//   grad_weight = sum over rows of grad * h        grad_bias = sum over rows of grad
//   grad_gate   = (1 - tanh(gate)^2) * sum of grad_s * branch over the rows kept (a single gate: and columns)
//
// Two forms of each:
// - Packets: a row is held in registers as 16-byte packets, so it is read once; a block per row, or a warp
// per
//   row and four rows per block when 32 packets suffice. Backward: a grid that stays on the device and walks
//   over the rows; each thread keeps its columns' share of the sums in registers and writes it once, a second
//   kernel adds the shares in a fixed order (no atomics: runs are reproducible).
// - Scalar: element by element and several passes, for rows that are not 16-byte aligned or too long for
//   registers.
// Whether weight, bias and gate are fp32 or as x is asked at run time, once per packet: they come from the L2
// cache, and as a template argument it would double the number of kernels. So is whether there is a mask or a
// gradient of the sum. tanh of a gate per column is computed anew for every element: by count of instructions
// about a third of what fits into the time that memory takes, where a table would be one more kernel.
#pragma once

#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace megamm {

// How a row is dealt out to threads.
struct NormPlan {
  int packets;  // per thread; 0: the row does not fit
  int threads;  // per row
  int rows;     // per block
};

inline NormPlan make_norm_plan(int64_t hidden, int width, int max_packets, int max_threads) {
  const int64_t row_packets = (hidden + width - 1) / width;
  for (int packets = 1; packets <= max_packets; packets *= 2) {
    const int64_t threads = (row_packets + packets * kWarp - 1) / (packets * kWarp) * kWarp;
    if (threads <= (packets < max_packets ? kPreferredThreads : max_threads)) {
      return {packets, static_cast<int>(threads), threads == kWarp ? kRowsPerBlock : 1};
    }
  }
  return {0, kPreferredThreads, 1};
}

// Most packets that a thread has registers for.
constexpr int kForwardPackets = 4;
template <typename T, Norm kNorm, Join kJoin>
constexpr int kBackwardPackets = kNorm != Norm::kNone && kJoin == Join::kGate ? 2
                                 : kNorm == Norm::kLayer && sizeof(T) < 4     ? 2
                                                                              : 4;

template <typename T, Norm kNorm, Join kJoin>
NormPlan backward_plan(int64_t hidden) {
  return make_norm_plan(hidden, kPacketWidth<T>, kBackwardPackets<T, kNorm, kJoin>, kBackwardThreads);
}

// Whether the rows of a tensor, or of none, begin at multiples of 16 bytes.
template <typename T>
bool rows_aligned(const void* data, int64_t stride) {
  return data == nullptr || (is_aligned(data) && stride % kPacketWidth<T> == 0);
}

template <typename T, Norm kNorm, Join kJoin>
void launch_norm_forward(const NormForward& args, cudaStream_t stream) {
  const NormPlan plan = make_norm_plan(args.hidden, kPacketWidth<T>, kForwardPackets, kForwardThreads);
  const bool aligned = rows_aligned<T>(args.x, args.x_stride) &&
                       rows_aligned<T>(args.branch, args.branch_stride) &&
                       rows_aligned<T>(args.y, args.hidden) && rows_aligned<T>(args.sum, args.hidden) &&
                       is_aligned(args.weight) && is_aligned(args.bias) &&
                       (!args.gate.per_column || is_aligned(args.gate.values));
  const auto launch = [&](auto kernel, dim3 block) {
    const int64_t blocks = (args.rows + block.y - 1) / block.y;
    kernel<<<static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid), block, 0, stream>>>(args);
  };
  const auto choose = [&](auto columns) {
    constexpr bool kColumns = decltype(columns)::value;
    const dim3 block(plan.threads, plan.rows);
    switch (aligned ? plan.packets : 0) {
      case 1:
        return launch(norm_forward_packets<T, 1, kNorm, kJoin, kColumns>, block);
      case 2:
        return launch(norm_forward_packets<T, 2, kNorm, kJoin, kColumns>, block);
      case 4:
        return launch(norm_forward_packets<T, 4, kNorm, kJoin, kColumns>, block);
      default:
        return launch(norm_forward_scalar<T, kNorm, kJoin>, dim3(kPreferredThreads));
    }
  };
  if constexpr (kJoin == Join::kGate) {
    if (args.gate.per_column) return choose(std::true_type{});
  }
  choose(std::false_type{});
}

template <typename T, Norm kNorm, Join kJoin>
void launch_norm_backward(const NormBackward& args, cudaStream_t stream) {
  constexpr int kMost = kBackwardPackets<T, kNorm, kJoin>;
  const NormPlan plan = backward_plan<T, kNorm, kJoin>(args.hidden);
  const bool aligned =
      rows_aligned<T>(args.s, args.s_stride) && rows_aligned<T>(args.grad, args.grad_stride) &&
      rows_aligned<T>(args.grad_sum, args.grad_sum_stride) &&
      rows_aligned<T>(args.branch, args.branch_stride) && rows_aligned<T>(args.grad_x, args.hidden) &&
      rows_aligned<T>(args.grad_branch, args.hidden) && is_aligned(args.weight) &&
      (!args.gate.per_column || is_aligned(args.gate.values));
  const auto launch = [&](auto kernel, dim3 block) {
    kernel<<<static_cast<unsigned>(args.partial_rows / block.y), block, 0, stream>>>(args);
  };
  const bool sums =
      args.weight_partials != nullptr || args.bias_partials != nullptr || args.gate_partials != nullptr;
  const auto choose = [&](auto columns, auto with_sums) {
    constexpr bool kColumns = decltype(columns)::value, kSums = decltype(with_sums)::value;
    const dim3 block(plan.threads, plan.rows);
    switch (aligned ? plan.packets : 0) {
      case 1:
        return launch(norm_backward_packets<T, 1, kNorm, kJoin, kColumns, kSums>, block);
      case 2:
        return launch(norm_backward_packets<T, 2, kNorm, kJoin, kColumns, kSums>, block);
      case 4:
        if constexpr (kMost >= 4) {
          return launch(norm_backward_packets<T, 4, kNorm, kJoin, kColumns, kSums>, block);
        }
        [[fallthrough]];
      default:
        return launch(norm_backward_scalar<T, kNorm, kJoin>, dim3(kPreferredThreads));
    }
  };
  const auto choose_sums = [&](auto columns) {
    // a branch whose gate is frozen is not worth kernels of its own
    if constexpr (kJoin != Join::kGate) {
      if (!sums) return choose(columns, std::false_type{});
    }
    choose(columns, std::true_type{});
  };
  if (kJoin == Join::kGate && args.gate.per_column) {
    if constexpr (kJoin == Join::kGate) choose_sums(std::true_type{});
  } else {
    choose_sums(std::false_type{});
  }
  if (!sums) return;
  const auto partials = [](const void* data) { return static_cast<const float*>(data); };
  const bool weight_fp32 = args.weight_dtype == DType::kFloat32;
  const bool gate_fp32 = args.gate.dtype == DType::kFloat32;
  const PartialSums all = {
      {{partials(args.weight_partials), args.grad_weight, nullptr, args.hidden, weight_fp32},
       {partials(args.bias_partials), args.grad_bias, nullptr, args.hidden, weight_fp32},
       {partials(args.gate_partials), args.grad_gate, args.gate.values,
        args.gate.per_column ? args.hidden : 1, gate_fp32}}};
  const dim3 grid(static_cast<unsigned>((args.hidden + kWarp - 1) / kWarp), 3);
  sum_partials<T><<<grid, dim3(kWarp, kWarp), 0, stream>>>(all, args.partial_rows);
}

template <typename T, Norm kNorm, Join kJoin>
int64_t norm_partial_rows(const NormBackward& args) {
  int device = 0, num_multiprocessors = 1;  // if the device cannot be asked, the launch will report it
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const NormPlan plan = backward_plan<T, kNorm, kJoin>(args.hidden);
  const int64_t resident = int64_t{num_multiprocessors} * (kThreadsPerSM / (plan.threads * plan.rows));
  const int64_t blocks = (args.rows + plan.rows - 1) / plan.rows;
  return (blocks < resident ? blocks : resident) * plan.rows;
}

template <Norm kNorm, Join kJoin>
constexpr NormKernels norm_kernels_cuda() {
  // nothing but a gate needs to know in the backward how s was made
  constexpr Join kBackwardJoin = kJoin == Join::kGate ? kJoin : Join::kNone;
  return {[](const NormForward& args, void* stream) {
            return dispatch_cuda(args.dtype, [&](auto element) {
              launch_norm_forward<decltype(element), kNorm, kJoin>(args, static_cast<cudaStream_t>(stream));
            });
          },
          [](const NormBackward& args, void* stream) {
            return dispatch_cuda(args.dtype, [&](auto element) {
              launch_norm_backward<decltype(element), kNorm, kBackwardJoin>(
                  args, static_cast<cudaStream_t>(stream));
            });
          },
          [](const NormBackward& args) {
            return args.dtype == DType::kFloat32 ? norm_partial_rows<float, kNorm, kBackwardJoin>(args)
                                                 : norm_partial_rows<__half, kNorm, kBackwardJoin>(args);
          }};
}

}  // namespace megamm
