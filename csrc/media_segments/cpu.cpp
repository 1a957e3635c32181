// Media segments on the CPU: one pass over each row. The layout of the result is in kernel.cu.
#include <ATen/Parallel.h>

#include <atomic>

#include "media_segments.h"

namespace megamm {
namespace {

constexpr int64_t kGrainPositions = 1 << 14;  // below this a thread costs more than it saves

// False if the images of this row are out of order.
bool segments_of_row(const MediaSegments& args, int64_t row) {
  const int64_t per_row = 2 * args.images + 1, base = row * args.positions;
  const int64_t* image = args.image + base;
  int32_t* q = args.cu_seqlens_q + row * per_row;
  int32_t* k = args.cu_seqlens_k + row * per_row;
  for (int64_t i = 0; i < per_row; ++i) {
    k[i] = static_cast<int32_t>((row * args.images + i / 2) * args.latents);
  }
  q[0] = static_cast<int32_t>(base);
  int64_t latest = 0, previous = 0;
  for (int64_t position = 0; position < args.positions; ++position) {
    const int64_t own = image[position] >= 1 && image[position] <= args.images ? image[position] : 0;
    if (own == previous) continue;
    const int32_t here = static_cast<int32_t>(base + position);
    if (previous > 0) q[2 * previous] = here;  // its end
    if (own > 0) {
      if (own <= latest) return false;
      while (latest + 1 < own) {  // images that no position sees
        ++latest;
        q[2 * latest - 1] = q[2 * latest] = here;
      }
      latest = own;
      q[2 * own - 1] = here;
    }
    previous = own;
  }
  const int32_t end = static_cast<int32_t>(base + args.positions);
  if (previous > 0) q[2 * previous] = end;
  for (int64_t unseen = latest + 1; unseen <= args.images; ++unseen) q[2 * unseen - 1] = q[2 * unseen] = end;
  return true;
}

}  // namespace

bool media_segments_cpu(const MediaSegments& args) {
  std::atomic<bool> in_order{true};
  const int64_t grain = args.positions > kGrainPositions ? 1 : kGrainPositions / (args.positions + 1) + 1;
  at::parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!segments_of_row(args, row)) in_order = false;
    }
  });
  const int64_t last = args.rows * (2 * args.images + 1);
  args.cu_seqlens_q[last] = static_cast<int32_t>(args.rows * args.positions);
  args.cu_seqlens_k[last] = static_cast<int32_t>(args.rows * args.images * args.latents);
  return in_order;
}

}  // namespace megamm
