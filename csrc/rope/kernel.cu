// Rotary positions (half-split) for CUDA: sm_80 (A100) and sm_90a (H100, H200).
//
// Math, per head x of a token at position p, R = rotary_dim, i < R / 2, in fp32, rounded once when written:
//   y[i]         = x[i] cos(p, i) - x[i + R/2] sin(p, i)
//   y[i + R/2]   = x[i + R/2] cos(p, i) + x[i] sin(p, i)              y[j] = x[j] for j >= R
// The gradient is the same with the sign of the sines changed; nothing but the table is kept for it.
//
// Bytes moved, for e bytes per element and N elements of all heads of all parts:
//   2 N e          read and written; and 4 R per token for the table, read once per token from L2
// Splitting the output of the fused projection (queries, keys and values of a group of heads side by side)
// costs no pass of its own: reading and writing take any strides between heads.
//
// Versions:
//   1. packets (this file, kWidth 8 or 4): a thread owns a 16-byte packet of the first half of a head and the
//   one
//      of the second half that turns with it, loads their cosines and sines once and goes over the heads of
//      the token with them, kHeads at a time with all their loads before the first use.
//   2. scalar (the same code with kWidth 1), for heads that are not 16-byte aligned.
// Not timed on a GPU so far; compiled for both targets by the tests.
#include "../common/packet.cuh"
#include "rope.h"

namespace megamm {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 2;      // that a thread has in flight
constexpr int kMaxLanes = 64;  // most threads of a head
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

// Where head `head` of a token, counted over all parts, is read and written.
template <typename T>
struct Head {
  const T* from;
  T* to;
  bool rotated;
};

template <typename T>
__device__ __forceinline__ Head<T> head_at(const Rope& args, int64_t sequence, int64_t batch, int head) {
  int p = 0;
  while (head >= args.parts[p].heads) head -= static_cast<int>(args.parts[p++].heads);
  const RopePart& part = args.parts[p];
  const int per_group = static_cast<int>(part.group_heads);
  const int group = head / per_group, within = head - group * per_group;
  const auto offset = [&](const RopeView& view) {
    return sequence * view.sequence_stride + batch * view.batch_stride + group * view.group_stride +
           within * view.head_stride;
  };
  return {reinterpret_cast<const T*>(part.from.data) + offset(part.from),
          reinterpret_cast<T*>(part.to.data) + offset(part.to), part.rotated};
}

// `kCount` floats, by reads as wide as kCount allows.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kCount]) {
  constexpr int kWidth = kCount % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) {
    const Packet<float, kWidth> packet = load_packet<kWidth>(from + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) to[i + j] = packet.values[j];
  }
}

// Both packets of a pair, in place.
template <typename T, int kWidth>
__device__ __forceinline__ void turn(Packet<T, kWidth>& first, Packet<T, kWidth>& second,
                                     const float (&cosines)[kWidth], const float (&sines)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float a = to_float(first.values[i]), b = to_float(second.values[i]);
    first.values[i] = from_float<T>(a * cosines[i] - b * sines[i]);
    second.values[i] = from_float<T>(b * cosines[i] + a * sines[i]);
  }
}

// Threads of a block: x = lanes (packets of half a head) times slots (heads), y = tokens.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    rotate(const __grid_constant__ Rope args, int heads, int lanes, int slots) {
  const int slot = threadIdx.x / lanes, lane = threadIdx.x - slot * lanes;
  const int64_t half = args.rotary_dim / 2;
  const int64_t first_sequence = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t batch = blockIdx.y; batch < args.batch; batch += gridDim.y) {
    for (int64_t sequence = first_sequence; sequence < args.sequence; sequence += step) {
      int64_t position = sequence;
      if (args.positions != nullptr) {
        position =
            args.positions[sequence * args.position_sequence_stride + batch * args.position_batch_stride];
        if (position < 0 || position >= args.table_rows) __trap();
      }
      const float* table = static_cast<const float*>(args.table) + position * args.rotary_dim;
      for (int64_t i = int64_t{lane} * kWidth; i < half; i += int64_t{lanes} * kWidth) {
        float cosines[kWidth], sines[kWidth];
        load_floats(table + i, cosines);
        load_floats(table + half + i, sines);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sines[k] = args.inverse ? -sines[k] : sines[k];
        for (int head = slot; head < heads; head += slots * kHeads) {
          Packet<T, kWidth> first[kHeads], second[kHeads];
          Head<T> at[kHeads];
#pragma unroll
          for (int h = 0; h < kHeads; ++h) {
            if (head + h * slots >= heads) continue;
            at[h] = head_at<T>(args, sequence, batch, head + h * slots);
            first[h] = load_packet<kWidth>(at[h].from + i);
            second[h] = load_packet<kWidth>(at[h].from + half + i);
          }
#pragma unroll
          for (int h = 0; h < kHeads; ++h) {
            if (head + h * slots >= heads) continue;
            if (at[h].rotated) turn(first[h], second[h], cosines, sines);
            store_packet(at[h].to + i, first[h]);
            store_packet(at[h].to + half + i, second[h]);
          }
        }
      }
      for (int64_t i = 2 * half + int64_t{lane} * kWidth; i < args.head_dim; i += int64_t{lanes} * kWidth) {
        for (int head = slot; head < heads; head += slots) {
          const Head<T> at = head_at<T>(args, sequence, batch, head);
          store_packet(at.to + i, load_packet<kWidth>(at.from + i));
        }
      }
    }
  }
}

bool view_aligned(const RopeView& view, int width) {
  return is_aligned(view.data) && view.sequence_stride % width == 0 && view.batch_stride % width == 0 &&
         view.group_stride % width == 0 && view.head_stride % width == 0;
}

template <typename T>
void launch(const Rope& args, cudaStream_t stream) {
  constexpr int kWidth = kPacketWidth<T>;
  int64_t heads = 0;
  bool wide = args.rotary_dim % (2 * kWidth) == 0 && args.head_dim % kWidth == 0 && is_aligned(args.table);
  for (int p = 0; p < args.num_parts; ++p) {
    heads += args.parts[p].heads;
    wide = wide && view_aligned(args.parts[p].from, kWidth) && view_aligned(args.parts[p].to, kWidth);
  }
  const int64_t columns = args.rotary_dim > 0 ? args.rotary_dim / 2 : args.head_dim;
  const int64_t packets = wide ? columns / kWidth : columns;
  const int lanes = static_cast<int>(packets < kMaxLanes ? packets : kMaxLanes);
  const int64_t wanted = (heads + kHeads - 1) / kHeads, most = kThreads / lanes;
  const int slots = static_cast<int>(wanted < most ? wanted : most);
  const int tokens = kThreads / (lanes * slots);
  const int64_t tiles = (args.sequence + tokens - 1) / tokens;
  const dim3 grid(static_cast<unsigned>(tiles < kMaxGridX ? tiles : kMaxGridX),
                  static_cast<unsigned>(args.batch < kMaxGridY ? args.batch : kMaxGridY));
  const dim3 block(lanes * slots, tokens);
  if (wide) {
    rotate<T, kWidth><<<grid, block, 0, stream>>>(args, static_cast<int>(heads), lanes, slots);
  } else {
    rotate<T, 1><<<grid, block, 0, stream>>>(args, static_cast<int>(heads), lanes, slots);
  }
}

}  // namespace

const char* rope_cuda(const Rope& args, void* stream) {
  return dispatch_cuda(
      args.dtype, [&](auto element) { launch<decltype(element)>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace megamm
