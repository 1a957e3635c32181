// CRC-32 of rows: what bind.cpp calls and cpu.cpp implements. Free of torch headers.
#pragma once

#include <cstdint>

namespace megamm {

// One of the arrays that rows have a stretch of; bind.cpp has checked that each lies inside.
struct Part {
  const uint8_t* bytes;
  const int64_t *starts, *ends;  // [rows], in units of
  int64_t unit;                  // so many bytes
};

struct Crc32Rows {
  const Part* parts;
  int64_t num_parts, rows;
  const int64_t* seeds;  // [rows], 32 bits of each
  int64_t* out;          // [rows]
};

// The checksum of each row's stretches, one part after the other: what zlib's crc32 gives for them.
void crc32_rows_cpu(const Crc32Rows& args);

}  // namespace megamm
