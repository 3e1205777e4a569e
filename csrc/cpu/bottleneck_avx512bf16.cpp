#include "cpu/bottleneck_steps.h"

namespace peft_kernels {

const BottleneckKernels kBottleneckBf16Pairs = bottleneck_kernels<Bf16Unit>();

}  // namespace peft_kernels
