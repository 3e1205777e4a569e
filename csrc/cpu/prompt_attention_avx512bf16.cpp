#include "cpu/prompt_attention_tiles.h"

namespace peft_kernels {

const PromptKernels kPromptAvx512Bf16 = {{pack<Float32Unit>, forward<Float32Unit>, direct, backward<Float32Unit>},
                                         {pack<Bf16Unit>, forward<Bf16Unit>, direct, backward<Bf16Unit>}};

}  // namespace peft_kernels
