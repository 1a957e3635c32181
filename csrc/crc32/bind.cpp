// CRC-32 of rows: schema, argument checks and the way from tensors to cpu.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "crc32.h"

namespace megamm {
namespace {

using at::Tensor;

const int64_t* numbers(const Tensor& tensor, int64_t count) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kLong && tensor.dim() == 1 && tensor.size(0) == count &&
                        tensor.is_contiguous(),
                    "megamm::crc32_rows: a list is ", tensor.scalar_type(), " ", tensor.sizes(),
                    ", expected a contiguous Long [", count, "]");
  return tensor.const_data_ptr<int64_t>();
}

Tensor crc32_rows(at::TensorList arrays, at::TensorList starts, at::TensorList ends, const Tensor& seeds) {
  TORCH_CHECK_VALUE(starts.size() == arrays.size() && ends.size() == arrays.size(),
                    "megamm::crc32_rows: ", arrays.size(), " arrays, ", starts.size(), " starts and ",
                    ends.size(), " ends");
  Crc32Rows args{};
  args.rows = seeds.numel();
  args.seeds = numbers(seeds, args.rows);
  std::vector<Part> parts;
  for (size_t p = 0; p < arrays.size(); ++p) {
    const Tensor& array = arrays[p];
    TORCH_CHECK_VALUE(array.dim() >= 1 && array.is_contiguous() && array.device().is_cpu(),
                      "megamm::crc32_rows: array ", p, " is ", array.sizes(),
                      ", expected a contiguous [n, ...]");
    Part part{};
    const int64_t size = array.size(0);
    part.bytes = static_cast<const uint8_t*>(array.const_data_ptr());
    part.unit = size > 0 ? static_cast<int64_t>(array.nbytes()) / size : 0;
    part.starts = numbers(starts[p], args.rows);
    part.ends = numbers(ends[p], args.rows);
    for (int64_t i = 0; i < args.rows; ++i) {
      TORCH_CHECK_INDEX(part.starts[i] >= 0 && part.starts[i] <= part.ends[i] && part.ends[i] <= size,
                        "megamm::crc32_rows: row ", i, " is [", part.starts[i], ", ", part.ends[i],
                        ") of an array of ", size);
    }
    parts.push_back(part);
  }
  const Tensor out = at::empty({args.rows}, seeds.options());
  args.parts = parts.data();
  args.num_parts = static_cast<int64_t>(parts.size());
  args.out = out.mutable_data_ptr<int64_t>();
  crc32_rows_cpu(args);
  return out;
}

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def("crc32_rows(Tensor[] arrays, Tensor[] starts, Tensor[] ends, Tensor seeds) -> Tensor");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) { m.impl("crc32_rows", crc32_rows); }

}  // namespace
}  // namespace megamm
