// Media segments: schema, argument checks and the way from tensors to the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "media_segments.h"
#ifdef MEGAMM_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace megamm {
namespace {

using at::Tensor;
using TwoTensors = std::tuple<Tensor, Tensor>;

// Allocates the outputs; launch(arguments) fills them.
template <typename Launch>
TwoTensors segments(const Tensor& image, int64_t images, int64_t latents, const Launch& launch) {
  TORCH_CHECK_VALUE(image.dim() == 2 && image.scalar_type() == at::kLong, "megamm::media_segments: image is ",
                    image.scalar_type(), " ", image.sizes(), ", expected [rows, positions] of Long");
  TORCH_CHECK_VALUE(images >= 0 && latents >= 0, "megamm::media_segments: ", images, " images of ", latents,
                    " latents");
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  const int64_t rows = image.size(0);
  TORCH_CHECK_VALUE(image.numel() <= limit && rows * images * latents <= limit,
                    "megamm::media_segments: more positions or media tokens than 32 bits can count");
  const auto options = image.options().dtype(at::kInt);
  const Tensor cu_seqlens_q = at::empty({rows * (2 * images + 1) + 1}, options);
  const Tensor cu_seqlens_k = at::empty({rows * (2 * images + 1) + 1}, options);
  if (rows == 0) {
    cu_seqlens_q.zero_();
    cu_seqlens_k.zero_();
    return {cu_seqlens_q, cu_seqlens_k};
  }
  const Tensor dense = image.contiguous();
  MediaSegments args{};
  args.image = dense.const_data_ptr<int64_t>();
  args.cu_seqlens_q = cu_seqlens_q.mutable_data_ptr<int32_t>();
  args.cu_seqlens_k = cu_seqlens_k.mutable_data_ptr<int32_t>();
  args.rows = rows;
  args.positions = image.size(1);
  args.images = images;
  args.latents = latents;
  launch(args);
  return {cu_seqlens_q, cu_seqlens_k};
}

TwoTensors segments_cpu(const Tensor& image, int64_t images, int64_t latents) {
  return segments(image, images, latents, [](const MediaSegments& args) {
    TORCH_CHECK_VALUE(media_segments_cpu(args), "megamm::media_segments: images out of order in a row");
  });
}

#ifdef MEGAMM_WITH_CUDA
TwoTensors segments_cuda(const Tensor& image, int64_t images, int64_t latents) {
  const c10::cuda::CUDAGuard guard(image.device());
  return segments(image, images, latents, [](const MediaSegments& args) {
    const char* error = media_segments_cuda(args, c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == nullptr, "megamm::media_segments: ", error);
  });
}
#endif

TORCH_LIBRARY_FRAGMENT(megamm, m) {
  m.def(
      "media_segments(Tensor image, int num_images, int num_latents) "
      "-> (Tensor cu_seqlens_q, Tensor cu_seqlens_k)");
}

TORCH_LIBRARY_IMPL(megamm, CPU, m) { m.impl("media_segments", segments_cpu); }

#ifdef MEGAMM_WITH_CUDA
TORCH_LIBRARY_IMPL(megamm, CUDA, m) { m.impl("media_segments", segments_cuda); }
#endif

}  // namespace
}  // namespace megamm
