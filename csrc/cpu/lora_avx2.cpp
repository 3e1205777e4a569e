#include "cpu/lora_portable.h"

namespace peft_kernels {

const LoraKernels kLoraAvx2 = {false, false, 0, pack_panel, shrink, wgrad, wgrad_store, expand_add, dropout_rows};

}  // namespace peft_kernels
