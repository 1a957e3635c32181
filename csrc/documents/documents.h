// Documents: what bind.cpp calls and cpu.cpp implements. Free of torch headers.
//
// A sample is a stretch of two flat arrays, usually mapped files: its ids and, for each, whether it is
// learnt. bind.cpp has checked that every stretch lies inside the arrays and is not empty.
#pragma once

#include <cstdint>

namespace megamm {

struct Stretches {
  const void* tokens;            // uint16 or, if wide, int32
  const uint8_t* learnt;         // one per token
  const int64_t *starts, *ends;  // [count]
  int64_t count;
  bool wide;
};

// How an image counts: its placeholder in a sample stands for so many positions of a row.
struct ImageRule {
  int64_t id, positions;
};

struct DocumentSizes {
  Stretches samples;
  ImageRule image;
  const int64_t *max_positions, *max_images;                            // [count], at least 1 and 0
  int64_t *positions, *images, *placeholders, *num_labels, *truncated;  // [count]
};

void document_sizes_cpu(const DocumentSizes& args);

struct FillRows {
  Stretches samples;
  ImageRule image;
  const int64_t *positions, *images;  // [count] of each document, what document_sizes gave
  const int64_t *rows, *offsets;      // [count] where each begins
  const int64_t *row_ends, *resume;  // [num_rows] where the padding begins; from what it counts its positions
  int64_t num_rows, length, pad_id;
  int64_t *input_ids, *labels, *position_ids;  // [num_rows, length]
};

// False if a document has more positions than its sample; then the rows mean nothing.
bool fill_rows_cpu(const FillRows& args);

struct GatherDocuments {
  const char* flat;
  const int64_t *starts, *ends;  // [count]
  int64_t* lengths;              // [count]
  const int64_t* offsets;        // [count] where each goes
  int64_t count, item;           // bytes of an element
  int64_t total;                 // elements
  char* out;
};

void gather_documents_cpu(const GatherDocuments& args);

}  // namespace megamm
