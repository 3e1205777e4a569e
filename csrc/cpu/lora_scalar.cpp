#include "cpu/lora_portable.h"

namespace peft_kernels {

const LoraKernels kLoraScalar = {false, false, 0, pack_panel, shrink, wgrad, wgrad_store, expand_add, dropout_rows};

}  // namespace peft_kernels
