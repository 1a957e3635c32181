// exp and the logistic function on vectors of float or double, inlined (at::vec calls a library for float).
#pragma once

#include "vec.h"

namespace megamm {

inline at::vec::Vectorized<double> vec_exp(const at::vec::Vectorized<double>& x) { return x.exp(); }

// exp(x) = 2^n exp(r) with n the integer next to x / ln 2, so |r| <= ln(2) / 2. exp(r) = 1 + r + r^2 P(r), P
// of degree 4 fitted for the smallest largest relative error (4e-9 before rounding; 2 ulp as computed). Below
// 2^-126 the result is 0, above 2^127.5 infinity; NaN stays NaN.
inline at::vec::Vectorized<float> vec_exp(const at::vec::Vectorized<float>& x) {
  using Vec = at::vec::Vectorized<float>;
  // n in [-127, 128]: as exponents, the ends are 0 and infinity. This order of arguments keeps NaN.
  const Vec bounded = at::vec::clamp(x, Vec(-88.3f), Vec(88.9f));
  const Vec n = (bounded * Vec(1.44269504f)).round();
  // ln 2 in two parts, the first of which has few enough bits that n times it is exact
  const Vec r = at::vec::fmadd(n, Vec(2.12194440e-4f), at::vec::fmadd(n, Vec(-0.693359375f), bounded));
  Vec p = at::vec::fmadd(Vec(0.0013814539f), r, Vec(0.008368745f));
  p = at::vec::fmadd(p, r, Vec(0.04166839f));
  p = at::vec::fmadd(p, r, Vec(0.16666521f));
  p = at::vec::fmadd(p, r, Vec(0.49999994f));
  p = at::vec::fmadd(p, r * r, r) + Vec(1.0f);
  const auto exponent = at::vec::convert_to_int_of_same_size(n) + at::vec::Vectorized<int32_t>(127);
  return p * at::vec::cast<float>(exponent << at::vec::Vectorized<int32_t>(23));
}

// Applies `function` to both vectors of a pair.
template <typename Acc, typename Function>
inline Pair<Acc> map(const Pair<Acc>& x, const Function& function) {
  return {function(x.lo), function(x.hi)};
}

// 1 / (1 + exp(-x))
template <typename Acc>
inline Pair<Acc> sigmoid(const Pair<Acc>& x) {
  using Vec = at::vec::Vectorized<Acc>;
  return map(x, [](const Vec& v) { return Vec(1) / (Vec(1) + vec_exp(v.neg())); });
}

}  // namespace megamm
