// Records that lie anywhere in memory: asking for the next ones early, as waiting for each takes longest.
#pragma once

#include <algorithm>
#include <cstdint>

namespace megamm {

constexpr int64_t kPrefetchAhead = 6;  // records

// Asks for the beginning of a record of `bytes`; what follows the hardware sees coming.
inline void prefetch(const void* record, int64_t bytes) {
  constexpr int64_t line = 64, most = 16 * line;
  for (int64_t at = 0; at < std::min(bytes, most); at += line) {
    __builtin_prefetch(static_cast<const char*>(record) + at);
  }
}

}  // namespace megamm
