#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/// For kernels alone (.cu): numbers of memory to the type that they are computed in, and back,
/// rounded to the nearest.
namespace drrl::cuda {

__device__ inline float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float widen(__half x) {
  return __half2float(x);
}
__device__ inline float widen(float x) {
  return x;
}
__device__ inline double widen(double x) {
  return x;
}

template <typename T, typename A>
__device__ T narrow(A x) {
  return static_cast<T>(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline __half narrow<__half, float>(float x) {
  return __float2half(x);
}

}  // namespace drrl::cuda
