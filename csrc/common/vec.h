// Vectorised loads and stores for CPU kernels that compute in fp32 (fp64 for double) whatever they read.
#pragma once

#include <ATen/cpu/vec/functional_bfloat16.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace megamm {

// The type that values of type T are computed in.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Two vectors of float or double: what one vector of a 16-bit type widens to.
template <typename Acc>
struct Pair {
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr int64_t kWidth = 2 * Vec::size();
  Vec lo, hi;

  Pair(const Vec& lo, const Vec& hi) : lo(lo), hi(hi) {}
  explicit Pair(Acc value) : lo(value), hi(value) {}

  friend Pair operator+(const Pair& a, const Pair& b) { return {a.lo + b.lo, a.hi + b.hi}; }
  friend Pair operator-(const Pair& a, const Pair& b) { return {a.lo - b.lo, a.hi - b.hi}; }
  friend Pair operator*(const Pair& a, const Pair& b) { return {a.lo * b.lo, a.hi * b.hi}; }
};

// Reads `count` <= kWidth elements and widens them; the lanes beyond are zero.
template <typename T>
inline Pair<acc_t<T>> load(const T* from, int64_t count) {
  constexpr int64_t half = Pair<acc_t<T>>::kWidth / 2;
  using Vec = at::vec::Vectorized<T>;
  if constexpr (!std::is_same_v<T, acc_t<T>>) {
    const auto [lo, hi] =
        at::vec::convert_to_float<T>(count == 2 * half ? Vec::loadu(from) : Vec::loadu(from, count));
    return {lo, hi};
  } else {
    if (count == 2 * half) return {Vec::loadu(from), Vec::loadu(from + half)};
    if (count <= half) return {Vec::loadu(from, count), Vec(0)};
    return {Vec::loadu(from), Vec::loadu(from + half, count - half)};
  }
}

// Rounds to T and writes the first `count` <= kWidth lanes.
template <typename T>
inline void store(T* to, const Pair<acc_t<T>>& value, int64_t count) {
  constexpr int64_t half = Pair<acc_t<T>>::kWidth / 2;
  if constexpr (!std::is_same_v<T, acc_t<T>>) {
    at::vec::convert_from_float<T>(value.lo, value.hi).store(to, count);
  } else {
    value.lo.store(to, count < half ? count : half);
    if (count > half) value.hi.store(to + half, count - half);
  }
}

// Calls body(offset, count) for every stretch of Pair<Acc>::kWidth elements, then once for the remainder.
// The count of a full stretch is a compile-time constant, so loads and stores of it have no branch.
template <typename Acc, typename Body>
inline void for_each_pair(int64_t size, const Body& body) {
  constexpr int64_t width = Pair<Acc>::kWidth;
  int64_t offset = 0;
  for (; offset + width <= size; offset += width) body(offset, std::integral_constant<int64_t, width>{});
  if (offset < size) body(offset, size - offset);
}

template <typename Acc>
inline Acc sum_lanes(const Pair<Acc>& value) {
  Acc lanes[Pair<Acc>::Vec::size()];
  (value.lo + value.hi).store(lanes);
  Acc total = 0;
  for (const Acc lane : lanes) total += lane;
  return total;
}

}  // namespace megamm
