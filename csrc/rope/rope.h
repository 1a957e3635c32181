// Rotary positions: what bind.cpp calls and kernel.cu (CUDA) and cpu.cpp implement. Free of torch headers.
//
// One call handles up to three tensors of the same tokens: queries, keys, and values on their way through.
// A token stands at (position in the sequence, row of the batch).
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace megamm {

// A [sequence, batch, heads, head_dim] tensor whose heads are dense; strides in elements. Heads come in
// groups: head h starts at (h / group_heads) * group_stride + (h % group_heads) * head_stride.
struct RopeView {
  char* data;
  int64_t sequence_stride, batch_stride, group_stride, head_stride;
};

struct RopePart {
  RopeView from, to;
  int64_t heads;
  int64_t group_heads;  // at least 1; divides heads
  bool rotated;         // else copied
};

struct Rope {
  static constexpr int kMaxParts = 3;
  RopePart parts[kMaxParts];
  int num_parts;
  int64_t sequence, batch;
  int64_t head_dim;
  int64_t rotary_dim;        // the first elements of a head that turn, an even number; the others are copied
  const void* table;         // [table_rows, rotary_dim], float (double for double): cosines, then sines
  int64_t table_rows;        // at least `sequence` without positions
  const int64_t* positions;  // [sequence, batch] rows of the table; null: the position in the sequence
  int64_t position_sequence_stride, position_batch_stride;
  bool inverse;  // turn backwards
  DType dtype;
};

// CPU: fp32, fp64, fp16, bf16. Throws an IndexError if a position is not in the table.
void rope_cpu(const Rope& args);

// CUDA: fp32, fp16, bf16. `stream` is a cudaStream_t. Null, or what went wrong; a position that is not in the
// table stops the kernel, as an index out of range does in torch.
const char* rope_cuda(const Rope& args, void* stream);

}  // namespace megamm
