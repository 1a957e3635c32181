// Documents: schemas, argument checks and the way from tensors to cpu.cpp. Data is prepared on CPUs alone, so
// there is no kernel for others.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "documents.h"

namespace megamm {
namespace {

using at::Tensor;

constexpr int64_t kSizes = 5;  // numbers that describe a document

// A dense list of `count` numbers.
const int64_t* numbers(const Tensor& tensor, int64_t count, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kLong && tensor.dim() == 1 && tensor.size(0) == count &&
                        tensor.is_contiguous(),
                    "megamm::documents: ", name, " is ", tensor.scalar_type(), " ", tensor.sizes(),
                    ", expected a contiguous Long [", count, "]");
  return tensor.const_data_ptr<int64_t>();
}

// Every stretch lies in [0, size] and has at least `least` elements.
void check_stretches(const int64_t* starts, const int64_t* ends, int64_t count, int64_t size, int64_t least) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(
        starts[i] >= 0 && ends[i] <= size && starts[i] <= ends[i] && ends[i] - starts[i] >= least,
        "megamm::documents: document ", i, " is [", starts[i], ", ", ends[i], ") of an array of ", size,
        least > 0 ? ", expected some of it" : "");
  }
}

Stretches stretches(const Tensor& tokens, const Tensor& learnt, const Tensor& starts, const Tensor& ends) {
  TORCH_CHECK_VALUE((tokens.scalar_type() == at::kUInt16 || tokens.scalar_type() == at::kInt) &&
                        tokens.dim() == 1 && tokens.is_contiguous(),
                    "megamm::documents: tokens are ", tokens.scalar_type(), " ", tokens.sizes(),
                    ", expected contiguous UInt16 or Int [n]");
  TORCH_CHECK_VALUE(
      learnt.scalar_type() == at::kByte && learnt.sizes() == tokens.sizes() && learnt.is_contiguous(),
      "megamm::documents: learnt is ", learnt.scalar_type(), " ", learnt.sizes(),
      ", expected contiguous Byte ", tokens.sizes());
  Stretches found{};
  found.count = starts.numel();
  found.tokens = tokens.const_data_ptr();
  found.learnt = learnt.const_data_ptr<uint8_t>();
  found.starts = numbers(starts, found.count, "starts");
  found.ends = numbers(ends, found.count, "ends");
  found.wide = tokens.scalar_type() == at::kInt;
  check_stretches(found.starts, found.ends, found.count, tokens.numel(), 1);
  return found;
}

ImageRule image_rule(int64_t id, int64_t positions) {
  TORCH_CHECK_VALUE(positions >= 1 && positions <= std::numeric_limits<int32_t>::max(),
                    "megamm::documents: ", positions, " positions of an image");
  return {id, positions};
}

Tensor document_sizes(const Tensor& tokens, const Tensor& learnt, const Tensor& starts, const Tensor& ends,
                      const Tensor& max_positions, const Tensor& max_images, int64_t tokens_per_image,
                      int64_t image_id) {
  DocumentSizes args{};
  args.samples = stretches(tokens, learnt, starts, ends);
  args.image = image_rule(image_id, tokens_per_image);
  const int64_t count = args.samples.count;
  args.max_positions = numbers(max_positions, count, "max_positions");
  args.max_images = numbers(max_images, count, "max_images");
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(args.max_positions[i] >= 1 && args.max_images[i] >= 0, "megamm::documents: document ",
                      i, " may have ", args.max_positions[i], " positions and ", args.max_images[i],
                      " images");
  }
  const Tensor out = at::empty({kSizes, count}, starts.options());
  int64_t* found = out.mutable_data_ptr<int64_t>();
  args.positions = found;
  args.images = found + count;
  args.placeholders = found + 2 * count;
  args.num_labels = found + 3 * count;
  args.truncated = found + 4 * count;
  document_sizes_cpu(args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> fill_rows(const Tensor& tokens, const Tensor& learnt, const Tensor& starts,
                                             const Tensor& ends, const Tensor& sizes, const Tensor& rows,
                                             int64_t num_rows, int64_t length, int64_t tokens_per_image,
                                             int64_t image_id, int64_t pad_id, bool restart) {
  FillRows args{};
  args.samples = stretches(tokens, learnt, starts, ends);
  args.image = image_rule(image_id, tokens_per_image);
  const int64_t count = args.samples.count;
  TORCH_CHECK_VALUE(sizes.scalar_type() == at::kLong && sizes.is_contiguous() &&
                        sizes.sizes() == at::IntArrayRef({kSizes, count}),
                    "megamm::documents: sizes are ", sizes.scalar_type(), " ", sizes.sizes(),
                    ", expected contiguous Long [", kSizes, ", ", count, "]");
  args.positions = sizes.const_data_ptr<int64_t>();
  args.images = args.positions + count;
  args.rows = numbers(rows, count, "rows");
  TORCH_CHECK_VALUE(num_rows >= 0 && length >= 0, "megamm::documents: ", num_rows, " rows of ", length);
  std::vector<int64_t> offsets(count), row_ends(num_rows), resume(num_rows);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = args.rows[i], before = i > 0 ? args.rows[i - 1] : 0;
    TORCH_CHECK_INDEX(row >= before && row < num_rows, "megamm::documents: document ", i, " goes into row ",
                      row, " of ", num_rows, " after one that goes into row ", before);
    offsets[i] = row_ends[row];
    TORCH_CHECK_VALUE(args.positions[i] >= 1 && args.positions[i] <= length - offsets[i],
                      "megamm::documents: document ", i, " of ", args.positions[i], " positions begins at ",
                      offsets[i], " of a row of ", length);
    row_ends[row] += args.positions[i];
    resume[row] = restart ? 0 : args.positions[i];
  }
  args.offsets = offsets.data();
  args.row_ends = row_ends.data();
  args.resume = resume.data();
  args.num_rows = num_rows;
  args.length = length;
  args.pad_id = pad_id;
  const Tensor input_ids = at::empty({num_rows, length}, starts.options());
  const Tensor labels = at::empty({num_rows, length}, starts.options());
  const Tensor position_ids = at::empty({num_rows, length}, starts.options());
  args.input_ids = input_ids.mutable_data_ptr<int64_t>();
  args.labels = labels.mutable_data_ptr<int64_t>();
  args.position_ids = position_ids.mutable_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(fill_rows_cpu(args), "megamm::documents: a document has more positions than its sample");
  return {input_ids, labels, position_ids};
}

std::tuple<Tensor, Tensor> gather_documents(const Tensor& flat, const Tensor& starts, const Tensor& ends) {
  TORCH_CHECK_VALUE(flat.dim() == 1 && flat.is_contiguous(), "megamm::documents: flat is ", flat.sizes(),
                    ", expected a contiguous [n]");
  GatherDocuments args{};
  args.count = starts.numel();
  args.starts = numbers(starts, args.count, "starts");
  args.ends = numbers(ends, args.count, "ends");
  check_stretches(args.starts, args.ends, args.count, flat.numel(), 0);
  std::vector<int64_t> offsets(args.count);
  for (int64_t i = 0; i < args.count; ++i) {
    offsets[i] = args.total;
    args.total += args.ends[i] - args.starts[i];
  }
  const Tensor out = at::empty({args.total}, flat.options());
  const Tensor lengths = at::empty({args.count}, starts.options());
  args.flat = static_cast<const char*>(flat.const_data_ptr());
  args.item = flat.element_size();
  args.offsets = offsets.data();
  args.lengths = lengths.mutable_data_ptr<int64_t>();
  args.out = static_cast<char*>(out.mutable_data_ptr());
  gather_documents_cpu(args);
  return {out, lengths};
}

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def(
      "document_sizes(Tensor tokens, Tensor learnt, Tensor starts, Tensor ends, Tensor max_positions, "
      "Tensor max_images, int tokens_per_image, int image_id) -> Tensor");
  m.def(
      "fill_rows(Tensor tokens, Tensor learnt, Tensor starts, Tensor ends, Tensor sizes, "
      "Tensor rows, int num_rows, int length, int tokens_per_image, int image_id, int pad_id, bool restart) "
      "-> (Tensor input_ids, Tensor labels, Tensor position_ids)");
  m.def("gather_documents(Tensor flat, Tensor starts, Tensor ends) -> (Tensor documents, Tensor lengths)");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) {
  m.impl("document_sizes", document_sizes);
  m.impl("fill_rows", fill_rows);
  m.impl("gather_documents", gather_documents);
}

}  // namespace
}  // namespace megamm
