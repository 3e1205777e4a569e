#include "cpu/bottleneck_steps.h"

namespace peft_kernels {

const BottleneckKernels kBottleneckAvx512 = bottleneck_kernels<F32Unit>();

}  // namespace peft_kernels
