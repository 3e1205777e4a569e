// Which instructions the kernels may use: what the processor and the system support, lowered on request.
#pragma once

#include <string>
#include <vector>

namespace peft_kernels {

// avx512 means F, BW, DQ, VL and VBMI (Ice Lake, Zen 4 and later); older AVX-512 machines run the AVX2 kernels.
enum class Isa { Scalar = 0, Avx2 = 1, Avx512 = 2, Avx512Bf16 = 3 };

// The level in force. The first call reads PEFT_KERNELS_ISA, which can only lower it; an unknown name throws.
Isa isa();

std::string isa_name();
void set_isa(const std::string& name);  // throws std::invalid_argument for a level this machine lacks
std::vector<std::string> supported_isas();

}  // namespace peft_kernels
