// CRC-32 (the polynomial of zlib, Ethernet and PNG) on the CPU.
//
// Math: the bits of a message are the coefficients of a polynomial over GF(2), the checksum is its remainder.
// A block X with n bits behind it may be replaced by X * (x^n mod P), added to those bits: with the
// carry-less multiplication of x86, four blocks of 16 bytes at a time move over the next 64 bytes, until 16
// bytes are left (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", 2009). These,
// short messages and other CPUs take 8 bytes at a time from tables. Numbers are bit-reflected: bit 31 is x^0.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "../common/prefetch.h"
#include "crc32.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MEGAMM_CLMUL __attribute__((target("pclmul,sse4.1")))
#include <immintrin.h>
#endif

namespace megamm {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;
constexpr int64_t kGrainBytes = 1 << 18;  // below this a thread costs more than it saves

constexpr uint32_t times_x(uint32_t value) { return (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0); }

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][byte]: remainder of the byte with k bytes of zeros behind it.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = times_x(value);
    tables[0][byte] = value;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = tables[0][before & 255] ^ (before >> 8);
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t by_tables(uint32_t crc, const uint8_t* data, int64_t size) {
  for (; size >= 8; data += 8, size -= 8) {
    const uint8_t first[4] = {static_cast<uint8_t>(crc), static_cast<uint8_t>(crc >> 8),
                              static_cast<uint8_t>(crc >> 16), static_cast<uint8_t>(crc >> 24)};
    crc = 0;
    for (size_t i = 0; i < 4; ++i) {
      crc ^= kTables[7 - i][data[i] ^ first[i]] ^ kTables[3 - i][data[4 + i]];
    }
  }
  for (; size > 0; ++data, --size) crc = kTables[0][(crc ^ *data) & 255] ^ (crc >> 8);
  return crc;
}

#ifdef MEGAMM_CLMUL

// x^exponent mod P as a factor: a product of two reflected numbers comes out one bit too low.
constexpr int64_t factor(int exponent) {
  uint32_t value = 0x80000000;
  for (int i = 0; i < exponent; ++i) value = times_x(value);
  return static_cast<int64_t>(value) << 1;
}

MEGAMM_CLMUL inline __m128i load(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// `block`, moved over the bits that `factors` are for, added to `next`.
MEGAMM_CLMUL inline __m128i fold(__m128i block, __m128i factors, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(block, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(block, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

MEGAMM_CLMUL uint32_t by_products(uint32_t crc, const uint8_t* data, int64_t size) {
  constexpr int64_t far_low = factor(512 + 32), far_high = factor(512 - 32);
  constexpr int64_t near_low = factor(128 + 32), near_high = factor(128 - 32);
  const __m128i far = _mm_set_epi64x(far_high, far_low), near = _mm_set_epi64x(near_high, near_low);
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int32_t>(crc)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
    a = fold(a, far, load(data));
    b = fold(b, far, load(data + 16));
    c = fold(c, far, load(data + 32));
    d = fold(d, far, load(data + 48));
  }
  a = fold(fold(fold(a, near, b), near, c), near, d);
  for (; size >= 16; data += 16, size -= 16) a = fold(a, near, load(data));
  uint8_t rest[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), a);
  return by_tables(by_tables(0, rest, 16), data, size);
}

#endif

uint32_t update(uint32_t crc, const uint8_t* data, int64_t size) {
#ifdef MEGAMM_CLMUL
  static const bool has_products = __builtin_cpu_supports("pclmul") != 0;
  if (has_products && size >= 64) return by_products(crc, data, size);
#endif
  return by_tables(crc, data, size);
}

}  // namespace

void crc32_rows_cpu(const Crc32Rows& args) {
  int64_t work = 1;
  for (int64_t p = 0; p < args.num_parts; ++p) {
    const Part& part = args.parts[p];
    for (int64_t i = 0; i < args.rows; ++i) work += (part.ends[i] - part.starts[i]) * part.unit;
  }
  const int64_t grain = std::max<int64_t>(1, args.rows * kGrainBytes / work);
  at::parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint32_t crc = ~static_cast<uint32_t>(args.seeds[i]);
      for (int64_t p = 0; p < args.num_parts; ++p) {
        const Part& part = args.parts[p];
        if (i + kPrefetchAhead < end) {
          const int64_t start = part.starts[i + kPrefetchAhead];
          prefetch(part.bytes + start * part.unit, (part.ends[i + kPrefetchAhead] - start) * part.unit);
        }
        crc =
            update(crc, part.bytes + part.starts[i] * part.unit, (part.ends[i] - part.starts[i]) * part.unit);
      }
      args.out[i] = static_cast<uint32_t>(~crc);
    }
  });
}

}  // namespace megamm
