#include "cpu/prompt_attention_tiles.h"

namespace peft_kernels {

const PromptKernels kPromptAvx512Bf16 = {{pack<Float32Unit>, forward<Float32Unit>, backward<Float32Unit>},
                                         {pack<Bf16Unit>, forward<Bf16Unit>, backward<Bf16Unit>}};

}  // namespace peft_kernels
