// Learned tokens before embedded ones, and the gradients of both. Bound by memory: rows are copied or summed once.
//
// All throw std::invalid_argument before anything is written. Sums are float32 in a fixed order, so results do not
// depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace peft_kernels {

// out[batch, tokens + length, hidden]: rows of `prompt`, then rows ids[batch, length] of `weight`; one dtype for all
// three.
void prompt_embedding_forward(const int64_t* ids, int64_t batch, int64_t length, const void* weight, int64_t vocabulary,
                              int64_t ld_weight, const void* prompt, int64_t tokens, int64_t ld_prompt, int64_t hidden,
                              DType dtype, void* out);

// out[tokens, hidden] = sum over b < batch of dy[b * stride_batch + t * stride_row + h].
void prompt_embedding_dprompt(const void* dy, DType dtype, int64_t batch, int64_t stride_batch, int64_t stride_row,
                              void* out, DType out_dtype, int64_t tokens, int64_t hidden);

// out[id, :] = sum of the rows of dy[., length, hidden] at those order[i] where ids[i] = id; ids[count] ascend. Other
// rows stay as they are. out has dy's dtype.
void prompt_embedding_dweight(const void* dy, DType dtype, int64_t length, int64_t stride_batch, int64_t stride_row,
                              const int64_t* ids, const int64_t* order, int64_t count, void* out, int64_t hidden);

}  // namespace peft_kernels
