#include "cpu/lora_avx512_expand.h"
#include "cpu/lora_avx512_shrink.h"
#include "cpu/lora_avx512_wgrad.h"

namespace peft_kernels {

const LoraKernels kLoraAvx512Bf16 = {true, true, 48, pack_panel, shrink, wgrad, wgrad_store, expand_add, dropout_rows};

}  // namespace peft_kernels
