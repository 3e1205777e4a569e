// The CUDA C++ sources as plain C++: what they use of the language and of the runtime library, on the host.
//
// A block's threads are fibres of one operating-system thread, which take turns at barriers and at operations of a
// whole warp, in an order drawn anew each time from a seed. Blocks run one after another. What this shows is whether
// the arithmetic and the indices are right and whether a barrier is missing; nothing about memory models or speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#include "cpu/dtype.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // one copy for all fibres; for a local variable it implies static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fibre that runs

namespace emulation {

void block_barrier();
// Puts 64 bytes down for the warp and takes what all its lanes put down.
struct Message {
  unsigned char bytes[64];
};
const Message* warp_exchange(const Message& mine);
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

// The groups of copies that the running thread has started and not waited for; the last one has not ended.
std::deque<std::vector<std::function<void()>>>& copies();

[[noreturn]] inline void misaligned(size_t bytes) {
  std::fprintf(stderr, "misaligned access of %zu bytes\n", bytes);
  std::abort();
}

template <typename T>
T shuffle(T value, int from) {
  Message mine = {};
  std::memcpy(mine.bytes, &value, sizeof(T));
  std::memcpy(&value, warp_exchange(mine)[from].bytes, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::shuffle(value, from % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, int(threadIdx.x % 32) ^ mask);
}
inline void __syncwarp() { emulation::warp_exchange({}); }
inline int min(int a, int b) { return std::min(a, b); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint32_t __float_as_uint(float value) { return peft_kernels::float_bits(value); }
inline float __uint_as_float(uint32_t bits) { return peft_kernels::bits_float(bits); }

// The runtime library: one device, whose sizes the tests choose.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidDevice };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int binaryVersion;
};

const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->binaryVersion = 90;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return cudaSuccess;
}
