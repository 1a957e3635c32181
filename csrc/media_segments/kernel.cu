// Media segments for CUDA: sm_80 (A100) and sm_90a (H100, H200).
//
// Math: a row of S positions and T images has 2 T + 1 segments, in this order,
//   text without image, the run of image 1, text without image, the run of image 2, ..., text without image,
// many of them empty. Within the row, and counted over the rows, segment by segment:
//   cu_seqlens_q   where the segment starts: that of image t where the row's running maximum first reaches t
//                  (an image that no position sees is empty there), the one behind it where its run ends
//   cu_seqlens_k   (row * T + segment / 2) * latents: text has none, an image all of its latents, in the
//                  order of the media themselves, seen or not
//
// Bytes moved: 8 rows S read, 8 rows (2 T + 1) written: tens of kilobytes, so what counts is that this is one
// launch and that nothing waits for it. (The same in torch operators is about 30 launches.)
//
// Versions:
//   1. a block per row (this file) that walks along it with a running maximum; each position writes the few
//      boundaries that lie at it, so no two threads write to one place.
// Not timed on a GPU so far; compiled for both targets by the tests.
#include <cuda_runtime.h>

#include "media_segments.h"

namespace megamm {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxGrid = 2147483647;  // of gridDim.x

__device__ __forceinline__ int image_at(const int64_t* image, int64_t position, int64_t images) {
  const int64_t number = image[position];
  return number >= 1 && number <= images ? static_cast<int>(number) : 0;
}

// The largest value of the threads before this one (`before`, at least `floor`) and of all (`all`).
__device__ __forceinline__ void running_max(int value, int floor, int* before, int* all) {
  __shared__ int of_warp[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int inclusive = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(~0u, inclusive, offset);
    if (lane >= offset) inclusive = max(inclusive, below);
  }
  if (lane == kWarp - 1) of_warp[warp] = inclusive;
  __syncthreads();
  const int below = __shfl_up_sync(~0u, inclusive, 1);
  *before = lane > 0 ? max(floor, below) : floor;
  *all = floor;
  for (int i = 0; i < kWarps; ++i) {
    *all = max(*all, of_warp[i]);
    if (i < warp) *before = max(*before, of_warp[i]);
  }
  __syncthreads();  // of_warp is written again in the next stretch
}

__global__ void __launch_bounds__(kThreads) media_segments(MediaSegments args) {
  const int64_t row = blockIdx.x, images = args.images, positions = args.positions;
  const int64_t per_row = 2 * images + 1, base = row * positions;
  const int64_t* image = args.image + base;
  int32_t* q = args.cu_seqlens_q + row * per_row;
  int32_t* k = args.cu_seqlens_k + row * per_row;
  for (int64_t i = threadIdx.x; i < per_row; i += kThreads) {
    k[i] = static_cast<int32_t>((row * images + i / 2) * args.latents);
  }
  if (threadIdx.x == 0) {
    q[0] = static_cast<int32_t>(base);
    if (row == args.rows - 1) {
      q[per_row] = static_cast<int32_t>(base + positions);
      k[per_row] = static_cast<int32_t>(args.rows * images * args.latents);
    }
  }
  int latest = 0;  // image before this stretch
  for (int64_t first = 0; first < positions; first += kThreads) {
    const int64_t position = first + threadIdx.x;
    const int own = position < positions ? image_at(image, position, images) : 0;
    int before, all;
    running_max(own, latest, &before, &all);
    for (int64_t started = before + 1; started <= own; ++started) {
      q[2 * started - 1] = static_cast<int32_t>(base + position);
      if (started < own) q[2 * started] = static_cast<int32_t>(base + position);  // no position sees it
    }
    const bool in_order = own > 0 && own >= before;
    if (in_order && (position + 1 == positions || image_at(image, position + 1, images) != own)) {
      q[2 * own] = static_cast<int32_t>(base + position + 1);
    }
    latest = all;
  }
  for (int64_t unseen = latest + 1 + threadIdx.x; unseen <= images; unseen += kThreads) {
    q[2 * unseen - 1] = q[2 * unseen] = static_cast<int32_t>(base + positions);
  }
}

}  // namespace

const char* media_segments_cuda(const MediaSegments& args, void* stream) {
  if (args.rows > kMaxGrid) return "too many rows";
  media_segments<<<static_cast<unsigned>(args.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megamm
