// Rotary positions on the CPU. Math as in kernel.cu.
//
// Tokens are dealt out to threads; the cosines and sines of a token stay in cache for all of its heads.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "../common/dispatch.h"
#include "../common/vec.h"
#include "rope.h"

namespace megamm {
namespace {

constexpr int64_t kGrainElements = 1 << 14;  // below this a thread costs more than it saves

// The first head of a token.
template <typename T>
T* token_at(const RopeView& view, int64_t sequence, int64_t batch) {
  return reinterpret_cast<T*>(view.data) + sequence * view.sequence_stride + batch * view.batch_stride;
}

template <typename T>
void rotate_head(const T* from, T* to, const acc_t<T>* table, int64_t half, const Pair<acc_t<T>>& sign) {
  for_each_pair<acc_t<T>>(half, [&](int64_t i, auto count) {
    const auto first = load(from + i, count), second = load(from + half + i, count);
    const auto cosine = load(table + i, count), sine = sign * load(table + half + i, count);
    store(to + i, first * cosine - second * sine, count);
    store(to + half + i, second * cosine + first * sine, count);
  });
}

int64_t position_of(const Rope& args, int64_t sequence, int64_t batch) {
  if (args.positions == nullptr) return sequence;
  const int64_t position =
      args.positions[sequence * args.position_sequence_stride + batch * args.position_batch_stride];
  TORCH_CHECK_INDEX(position >= 0 && position < args.table_rows, "megamm::rope: position ", position,
                    " is out of range, the table has ", args.table_rows, " rows");
  return position;
}

template <typename T>
void rotate_token(const Rope& args, int64_t sequence, int64_t batch) {
  using Acc = acc_t<T>;
  const Acc* table =
      static_cast<const Acc*>(args.table) + position_of(args, sequence, batch) * args.rotary_dim;
  const Pair<Acc> sign(args.inverse ? Acc(-1) : Acc(1));
  for (int p = 0; p < args.num_parts; ++p) {
    const RopePart& part = args.parts[p];
    const int64_t rotated = part.rotated ? args.rotary_dim : 0;
    const T* from_token = token_at<const T>(part.from, sequence, batch);
    T* to_token = token_at<T>(part.to, sequence, batch);
    for (int64_t group = 0; group < part.heads / part.group_heads; ++group) {
      for (int64_t head = 0; head < part.group_heads; ++head) {
        const T* from = from_token + group * part.from.group_stride + head * part.from.head_stride;
        T* to = to_token + group * part.to.group_stride + head * part.to.head_stride;
        if (part.rotated) rotate_head(from, to, table, rotated / 2, sign);
        std::copy(from + rotated, from + args.head_dim, to + rotated);
      }
    }
  }
}

template <typename T>
void rotate(const Rope& args) {
  int64_t heads = 0;
  for (int p = 0; p < args.num_parts; ++p) heads += args.parts[p].heads;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (heads * args.head_dim));
  at::parallel_for(0, args.sequence * args.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      rotate_token<T>(args, token / args.batch, token % args.batch);
    }
  });
}

}  // namespace

void rope_cpu(const Rope& args) {
  dispatch_cpu(args.dtype, [&](auto element) { rotate<decltype(element)>(args); });
}

}  // namespace megamm
