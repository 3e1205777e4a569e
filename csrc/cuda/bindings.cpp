// Every function that peft_kernels._native_cuda exports. Device pointers and streams travel as integers.
#include "cuda/linear_4bit.h"
#include "wire.h"

namespace py = pybind11;
using namespace peft_kernels;

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of peft_kernels: raw pointers in, no torch headers, no driver call at import.";
  py::module_::import("peft_kernels._native");  // has Weight4

  def_kernel<device_unsupported>(m, "device_unsupported", py::arg("device"));
  def_kernel<linear_4bit_unsupported>(m, "linear_4bit_unsupported", py::arg("weight"));
  def_kernel<linear_4bit_splits>(m, "linear_4bit_splits", py::arg("M"), py::arg("K"));
  def_kernel<linear_4bit_decode>(m, "linear_4bit_decode", py::arg("device"), py::arg("stream"), py::arg("x"),
                                 py::arg("dtype"), py::arg("M"), py::arg("ldx"), py::arg("weight"), py::arg("bias"),
                                 py::arg("bias_dtype"), py::arg("s"), py::arg("b"), py::arg("b_dtype"), py::arg("rank"),
                                 py::arg("scaling"), py::arg("y"), py::arg("planes"));
  def_kernel<lora_shrink_decode>(m, "lora_shrink_decode", py::arg("device"), py::arg("stream"), py::arg("x"),
                                 py::arg("dtype"), py::arg("M"), py::arg("K"), py::arg("ldx"), py::arg("a"),
                                 py::arg("a_dtype"), py::arg("rank"), py::arg("s"));
  def_kernel<decode_table>(m, "decode_table", py::arg("quant_type"), py::arg("dtype"));
}
