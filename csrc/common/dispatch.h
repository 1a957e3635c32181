// From an element type as a value to one as a type, for CPU kernels.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "dtype.h"

namespace megamm {

// Calls run(T{}) with the element type that `dtype` names.
template <typename Run>
void dispatch_cpu(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kFloat16:
      return run(c10::Half{});
    case DType::kBFloat16:
      return run(c10::BFloat16{});
  }
}

}  // namespace megamm
