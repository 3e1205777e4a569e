#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace peft_kernels {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};
constexpr int kLevels = 4;

#if defined(__x86_64__)

bool has(uint32_t word, std::initializer_list<int> bits) {
  return std::all_of(bits.begin(), bits.end(), [word](int bit) { return word >> bit & 1; });
}

// The register state that the operating system saves: bit 1 SSE, 2 AVX, 5-7 AVX-512.
uint32_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Isa detect() {
  uint32_t a, b, c, d;
  constexpr int kFma = 12, kOsxsave = 27, kAvx = 28, kF16c = 29;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, {kFma, kOsxsave, kAvx, kF16c})) return Isa::Scalar;
  const uint32_t state = saved_state();
  constexpr int kAvx2 = 5, kAvx512F = 16, kAvx512Dq = 17, kAvx512Bw = 30, kAvx512Vl = 31, kVbmi = 1;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, {kAvx2}) || !has(state, {1, 2})) return Isa::Scalar;
  if (!has(b, {kAvx512F, kAvx512Dq, kAvx512Bw, kAvx512Vl}) || !has(state, {5, 6, 7})) return Isa::Avx2;
#ifdef PEFT_KERNELS_EMULATE  // see setup.py
  return Isa::Avx512Bf16;
#endif
  if (!has(c, {kVbmi})) return Isa::Avx512;
  constexpr int kBf16 = 5;
  const bool has_bf16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, {kBf16});
  return has_bf16 ? Isa::Avx512Bf16 : Isa::Avx512;
}

#else

Isa detect() { return Isa::Scalar; }

#endif

Isa detected() {
  static const Isa level = detect();
  return level;
}

Isa parse(const std::string& name, const std::string& what) {
  for (int level = 0; level < kLevels; ++level)
    if (name == kNames[level]) return Isa(level);
  throw std::invalid_argument(what + "='" + name + "': expected scalar, avx2, avx512 or avx512bf16");
}

Isa initial() {
  const char* name = std::getenv("PEFT_KERNELS_ISA");
  return name && *name ? std::min(parse(name, "PEFT_KERNELS_ISA"), detected()) : detected();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> level{initial()};
  return level;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

std::string isa_name() { return kNames[int(isa())]; }

void set_isa(const std::string& name) {
  const Isa level = parse(name, "isa");
  if (level > detected()) throw std::invalid_argument("isa='" + name + "': this machine does not support it");
  current() = level;
}

std::vector<std::string> supported_isas() { return {kNames, kNames + int(detected()) + 1}; }

}  // namespace peft_kernels
