// y = x W^T + bias + scaling * S B^T for a few rows of x, on a CUDA device. Plain types: bindings.cpp sees no CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/weight4.h"

namespace peft_kernels {

constexpr int64_t kMostRows = 16;

// Why a weight cannot be served, as a sentence, or an empty string. Its rows must be whole 64s of at least one, and its
// blocks powers of two of at least 64; they may straddle rows.
std::string linear_4bit_unsupported(const Weight4& weight);

// Why the device cannot run the kernels, or an empty string. The first call of a process that needs a driver.
std::string device_unsupported(int device);

// How many float32 planes (splits, M, N) a call needs beside y: none where it answers 1.
int64_t linear_4bit_splits(int64_t M, int64_t K);

// x (M, K) and y (M, N) of dtype; bias (N,) or null. S (M, rank) float32 and B (N, rank), or null; S comes from
// the stream's last kernel. Nothing here allocates or waits for the device: fit for graph capture.
void linear_4bit_decode(int device, uintptr_t stream, const void* x, DType dtype, int64_t M, int64_t ldx,
                        const Weight4& weight, const void* bias, DType bias_dtype, const float* s, const void* b,
                        DType b_dtype, int64_t rank, float scaling, void* y, float* planes);

// The sixteen values of a code book as the kernels have them: code / unit, and then the unit.
std::vector<float> decode_table(QuantType quant_type, DType dtype);

// S (M, rank) float32 = x (M, K) A^T, A (rank, K).
void lora_shrink_decode(int device, uintptr_t stream, const void* x, DType dtype, int64_t M, int64_t K, int64_t ldx,
                        const void* a, DType a_dtype, int64_t rank, float* s);

}  // namespace peft_kernels
