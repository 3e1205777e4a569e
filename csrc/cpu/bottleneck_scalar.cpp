#include "cpu/bottleneck_steps.h"

namespace peft_kernels {

const BottleneckKernels kBottleneckScalar = bottleneck_kernels<F32Unit>();

}  // namespace peft_kernels
