#include "cpu/prompt_attention_tiles.h"

namespace peft_kernels {

const PromptKernels kPromptAvx512 = {{pack<Float32Unit>, forward<Float32Unit>, direct, backward<Float32Unit>}, {}};

}  // namespace peft_kernels
