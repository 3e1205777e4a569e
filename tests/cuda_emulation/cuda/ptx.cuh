// csrc/cuda/ptx.cuh without its assembly, from the definitions of those instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace peft_kernels {

inline float value_of(__half, uint16_t bits) { return f16_to_f32(bits); }
inline float value_of(__nv_bfloat16, uint16_t bits) { return bf16_to_f32(bits); }

template <typename T>
void matrix_multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  emulation::Message message = {};
  std::memcpy(message.bytes, mine, sizeof(mine));
  const emulation::Message* all = emulation::warp_exchange(message);
  // element `column` of register pair `first`, `first` + `step` of the four lanes of row (or column) g
  const auto element = [all](int g, int first, int step, int column) {
    uint32_t held[6];
    std::memcpy(held, all[4 * g + column % 8 / 2].bytes, sizeof(held));
    return value_of(T{}, uint16_t(held[first + step * (column / 8)] >> 16 * (column % 2)));
  };
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += element(g, i / 2, 2, k) * element(2 * t + i % 2, 4, 1, k);
    c[i] += sum;
  }
}

// The bytes arrive when they are waited for, and no sooner.
template <int BYTES>
void copy_async(void* to, const void* from, bool there) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES) emulation::misaligned(BYTES);
  emulation::copies().back().push_back([=] {
    if (there) std::memcpy(to, from, BYTES);
    if (!there) std::memset(to, 0, BYTES);
  });
}
inline void end_of_copies() { emulation::copies().emplace_back(); }
template <int LEFT>
void wait_for_copies() {
  auto& groups = emulation::copies();
  for (; groups.size() > LEFT + 1; groups.pop_front())  // the last one has not ended
    for (const auto& copy : groups.front()) copy();
}

inline void prefetch(const void*) {}
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

}  // namespace peft_kernels
