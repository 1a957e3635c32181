// Cross entropy over a vocabulary of which a process may hold a part: what bind.cpp calls and kernel.cu
// (CUDA) and cpu.cpp implement. Free of torch headers.
//
// Rows of logits may lie apart (stride in elements); a row is dense, everything else too. rows is at least 1.
// Column i of logits is entry vocab_start + i of the vocabulary; only the first `valid` columns are in it.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace megamm {

// Rows of what the statistics kernel writes, [kStatistics, rows].
enum CrossEntropyStatistic : int64_t {
  kMaximum,     // largest logit; the lowest finite number if there is none
  kSum,         // sum of exp(logit - maximum)
  kLabelLogit,  // logit of the label; 0 if it is not here
  kLoss,        // log(sum) + maximum - label logit: the loss if all of the vocabulary is here
  kStatistics
};

struct CrossEntropyArgs {
  const void* logits;  // [rows, columns], dtype
  int64_t stride;
  const int64_t* labels;  // [rows]; outside of [0, vocab_size) and not ignore_index: the loss becomes NaN
  int64_t rows, columns;
  int64_t vocab_start, valid, vocab_size;
  int64_t ignore_index;
  DType dtype;
};

struct CrossEntropyStatistics {
  CrossEntropyArgs args;
  void* statistics;  // [kStatistics, rows], float (double for double); 0, 1, 0, 0 for an ignored row
};

struct CrossEntropyGradient {
  CrossEntropyArgs args;
  const void* statistics;  // [2, rows]: maximum and sum over the whole vocabulary
  const void* grad_loss;   // [rows], as statistics
  void* grad;              // [rows, columns], dtype; may be logits itself
  int64_t grad_stride;
};

// CPU: fp32, fp64, fp16, bf16.
void cross_entropy_statistics_cpu(const CrossEntropyStatistics& call);
void cross_entropy_gradient_cpu(const CrossEntropyGradient& call);

// CUDA: fp32, fp16, bf16. `stream` is a cudaStream_t. Null, or what went wrong.
const char* cross_entropy_statistics_cuda(const CrossEntropyStatistics& call, void* stream);
const char* cross_entropy_gradient_cuda(const CrossEntropyGradient& call, void* stream);

}  // namespace megamm
