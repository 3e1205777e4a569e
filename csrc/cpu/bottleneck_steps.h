// The steps of bottleneck.cpp for one kind of unit.
#pragma once

#include "cpu/bottleneck_backward.h"
#include "cpu/bottleneck_columns.h"
#include "cpu/bottleneck_forward.h"
#include "cpu/bottleneck_weights.h"

namespace peft_kernels {
namespace {

template <class U>
constexpr BottleneckKernels bottleneck_kernels() {
  return {U::kElements,      widen,           pack_items<U>,    pack_forward<U>,  forward_rows<U>,
          hidden_columns<U>, up_gradients<U>, pack_backward<U>, backward_rows<U>, sum_dz<U>,
          down_gradients<U>};
}

}  // namespace
}  // namespace peft_kernels
