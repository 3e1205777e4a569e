// Turns a C++ function over typed pointers into one over integers, so that a binding is one line.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/dtype.h"
#include "cpu/weight4.h"

namespace peft_kernels {

// How a C++ argument travels from Python: a pointer as an integer (0 is null), an enum as its checked value.
template <typename T>
struct Wire {
  using type = T;
  static T unwrap(T value) { return value; }
};

template <typename T>
struct Wire<T*> {
  using type = std::uintptr_t;
  static T* unwrap(type value) { return reinterpret_cast<T*>(value); }
};

template <>
struct Wire<DType> {
  using type = int;
  static DType unwrap(int value) {
    if (value < 0 || value > 2)
      throw std::invalid_argument("dtype code " + std::to_string(value) + ": expected 0, 1, 2");
    return DType(value);
  }
};

template <>
struct Wire<QuantType> {
  using type = int;
  static QuantType unwrap(int value) {
    if (value != NF4 && value != FP4) throw std::invalid_argument("quant_type must be 0 (nf4) or 1 (fp4)");
    return QuantType(value);
  }
};

template <auto function>
struct Wired;

template <typename R, typename... Args, R (*function)(Args...)>
struct Wired<function> {
  static R call(typename Wire<Args>::type... args) { return function(Wire<Args>::unwrap(args)...); }
};

// m.def for a kernel: raw pointers as integers, the GIL released; std::invalid_argument becomes ValueError.
template <auto function, typename... Extra>
void def_kernel(pybind11::module_& m, const char* name, Extra&&... extra) {
  m.def(name, &Wired<function>::call, pybind11::call_guard<pybind11::gil_scoped_release>(),
        std::forward<Extra>(extra)...);
}

}  // namespace peft_kernels
