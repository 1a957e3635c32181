// Element types and wide accesses for CUDA kernels that compute in fp32. Free of torch headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace megamm {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Elements that a 16-byte access moves.
template <typename T>
constexpr int kPacketWidth = 16 / sizeof(T);

// What one access moves: kWidth elements, 16 bytes together, or 1.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Packet {
  T values[kWidth];
};

template <int kWidth, typename T>
__device__ __forceinline__ Packet<T, kWidth> load_packet(const T* from) {
  return *reinterpret_cast<const Packet<T, kWidth>*>(from);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_packet(T* to, const Packet<T, kWidth>& packet) {
  *reinterpret_cast<Packet<T, kWidth>*>(to) = packet;
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Calls run(T{}) with the element type that `dtype` names. Null, or what went wrong, the launch included.
template <typename Run>
const char* dispatch_cuda(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      run(float{});
      break;
    case DType::kFloat16:
      run(__half{});
      break;
    case DType::kBFloat16:
      run(__nv_bfloat16{});
      break;
    default:
      return "no CUDA kernel for this dtype";
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megamm
