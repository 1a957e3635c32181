// Element types as plain values, so that launchers need no torch header.
#pragma once

namespace megamm {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

}  // namespace megamm
