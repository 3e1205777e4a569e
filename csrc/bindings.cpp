// Every function that peft_kernels._native exports: the table of contents, nothing else.
#include "cpu/isa.h"
#include "wire.h"

namespace py = pybind11;
using namespace peft_kernels;

static Weight4 make_weight4(std::uintptr_t packed, std::uintptr_t absmax, std::uintptr_t absmax2, std::uintptr_t code2,
                            std::uintptr_t offset, int64_t nested_blocksize, int quant_type, int64_t N, int64_t K,
                            int64_t blocksize) {
  const Weight4 weight{Wire<const uint8_t*>::unwrap(packed),
                       Wire<const void*>::unwrap(absmax),
                       Wire<const float*>::unwrap(absmax2),
                       Wire<const float*>::unwrap(code2),
                       Wire<const float*>::unwrap(offset),
                       nested_blocksize,
                       Wire<QuantType>::unwrap(quant_type),
                       N,
                       K,
                       blocksize};
  check_weight4(weight);
  return weight;
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of peft_kernels: raw pointers in, no torch headers.";

  m.def("isa", &isa_name);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("supported_isas", &supported_isas);

  // Borrowed pointers: the caller keeps the tensors alive and contiguous for as long as the object is used.
  py::class_<Weight4>(m, "Weight4")
      .def(py::init(&make_weight4), py::arg("packed"), py::arg("absmax"), py::arg("absmax2"), py::arg("code2"),
           py::arg("offset"), py::arg("nested_blocksize"), py::arg("quant_type"), py::arg("N"), py::arg("K"),
           py::arg("blocksize"))
      .def_readonly("N", &Weight4::N)
      .def_readonly("K", &Weight4::K)
      .def_readonly("blocksize", &Weight4::blocksize);
}
