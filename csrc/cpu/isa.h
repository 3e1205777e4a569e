// Which instructions the kernels may use: what the processor and the system support, lowered on request.
#pragma once

#include <string>
#include <vector>

namespace peft_kernels {

// avx512 means F, BW, DQ and VL (Skylake-X and later); avx512bf16 means VBMI and BF16 too (Zen 4, Sapphire Rapids).
enum class Isa { Scalar = 0, Avx2 = 1, Avx512 = 2, Avx512Bf16 = 3 };

// The level in force. The first call reads PEFT_KERNELS_ISA, which can only lower it; an unknown name throws.
Isa isa();

std::string isa_name();
void set_isa(const std::string& name);  // throws std::invalid_argument for a level this machine lacks
std::vector<std::string> supported_isas();

}  // namespace peft_kernels
