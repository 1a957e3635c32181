// From tensors to what launchers take: plain element types, rows and strides.
#pragma once

#include <ATen/core/Tensor.h>

#include "dtype.h"

namespace megamm {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK(false, "megamm: no kernel for ", tensor.scalar_type());
  }
}

// The type that sums over `tensor` are kept in.
inline at::ScalarType accumulation_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// [..., H] as [rows, H] with dense rows; a view wherever strides allow, H > 0.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  const at::Tensor rows = tensor.reshape({-1, tensor.size(-1)});
  return rows.size(1) == 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// Elements between the rows of what as_rows() returned.
inline int64_t row_stride(const at::Tensor& rows) {
  return rows.size(0) == 1 ? rows.size(1) : rows.stride(0);
}

}  // namespace megamm
