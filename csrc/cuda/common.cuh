// What the CUDA kernels share: element types, errors, the device guard and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/dtype.h"

namespace peft_kernels {

constexpr int kWarp = 32;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The lower or the upper value of two in a register.
template <typename T>
__device__ __forceinline__ float half_of_pair(uint32_t pair, bool upper);
template <>
__device__ __forceinline__ float half_of_pair<__half>(uint32_t pair, bool upper) {
  return to_float(__ushort_as_half(uint16_t(upper ? pair >> 16 : pair)));
}
template <>
__device__ __forceinline__ float half_of_pair<__nv_bfloat16>(uint32_t pair, bool upper) {
  return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
}

// Elements i to i + 7, at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_eight(const void* from, int64_t i, float (&values)[8]) {
  const uint4 loaded = *reinterpret_cast<const uint4*>(static_cast<const T*>(from) + i);
  const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = half_of_pair<T>(pairs[j / 2], j % 2);
}

template <>
__device__ __forceinline__ void load_eight<float>(const void* from, int64_t i, float (&values)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const uint4 loaded = *reinterpret_cast<const uint4*>(static_cast<const float*>(from) + i + j);
    values[j] = __uint_as_float(loaded.x), values[j + 1] = __uint_as_float(loaded.y);
    values[j + 2] = __uint_as_float(loaded.z), values[j + 3] = __uint_as_float(loaded.w);
  }
}

// Element i of an array whose type is known at run time, as biases' and adapters' are.
__device__ __forceinline__ float load_as_float(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::F32) return static_cast<const float*>(data)[i];
  if (dtype == DType::F16) return to_float(static_cast<const __half*>(data)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current for as long as it lives: the caller's choice is his own.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// kernel<<<grid, threads, shared, stream>>>(arguments); overlaps: it may start before the kernel that precedes it on
// the stream has ended, and waits for that one itself.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, uintptr_t stream, bool overlaps,
            Arguments... arguments) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = overlaps ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

}  // namespace peft_kernels
