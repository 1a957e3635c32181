// Media segments: what bind.cpp calls and kernel.cu (CUDA) and cpu.cpp implement. Free of torch headers.
//
// Everything is dense. rows is at least 1; the counts in cu_seqlens_q and cu_seqlens_k fit into 32 bits.
#pragma once

#include <cstdint>

namespace megamm {

struct MediaSegments {
  const int64_t* image;   // [rows, positions], from 1; outside [1, images]: none
  int32_t* cu_seqlens_q;  // [rows * (2 * images + 1) + 1]
  int32_t* cu_seqlens_k;  // [rows * (2 * images + 1) + 1]
  int64_t rows, positions, images, latents;
};

// False if the images of a row do not come one after the other, each in one run: then there are no segments.
bool media_segments_cpu(const MediaSegments& args);

// `stream` is a cudaStream_t. Null, or what went wrong. Rows out of order give segments without a meaning.
const char* media_segments_cuda(const MediaSegments& args, void* stream);

}  // namespace megamm
