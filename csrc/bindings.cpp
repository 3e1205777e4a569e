// Every function that peft_kernels._native exports: the table of contents, nothing else.
#include "bottleneck_wire.h"
#include "cpu/columns.h"
#include "cpu/isa.h"
#include "cpu/linear_4bit.h"
#include "cpu/nf4_codec.h"
#include "cpu/prompt_embedding.h"
#include "lora_wire.h"
#include "prompt_wire.h"
#include "wire.h"

namespace py = pybind11;
using namespace peft_kernels;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of peft_kernels: raw pointers in, no torch headers.";

  m.def("isa", &isa_name);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("supported_isas", &supported_isas);

  // Borrowed pointers: the caller keeps the tensors alive and contiguous for as long as the object is used.
  py::class_<Weight4>(m, "Weight4")
      .def(py::init(&Wired<make_weight4>::call), py::arg("packed"), py::arg("absmax"), py::arg("absmax2"),
           py::arg("code2"), py::arg("offset"), py::arg("nested_blocksize"), py::arg("quant_type"), py::arg("N"),
           py::arg("K"), py::arg("blocksize"))
      .def_readonly("N", &Weight4::N)
      .def_readonly("K", &Weight4::K)
      .def_readonly("blocksize", &Weight4::blocksize);

  def_kernel<quantize_4bit>(m, "quantize_4bit", py::arg("x"), py::arg("dtype"), py::arg("numel"), py::arg("blocksize"),
                            py::arg("quant_type"), py::arg("packed"), py::arg("absmax"));
  def_kernel<quantize_nested>(m, "quantize_nested", py::arg("absmax"), py::arg("count"), py::arg("offset"),
                              py::arg("code2"), py::arg("nested_blocksize"), py::arg("codes"), py::arg("absmax2"));
  def_kernel<dequantize_4bit>(m, "dequantize_4bit", py::arg("weight"), py::arg("begin"), py::arg("end"), py::arg("out"),
                              py::arg("dtype"));

  def_kernel<linear_4bit_forward>(m, "linear_4bit_forward", py::arg("x"), py::arg("dtype"), py::arg("M"),
                                  py::arg("ldx"), py::arg("weight"), py::arg("bias"), py::arg("bias_dtype"),
                                  py::arg("terms"), py::arg("y"), py::arg("ldy"), py::arg("out_scale") = 0,
                                  py::arg("unscaled") = 0);
  def_kernel<linear_4bit_backward>(m, "linear_4bit_backward", py::arg("dy"), py::arg("dtype"), py::arg("M"),
                                   py::arg("ldy"), py::arg("weight"), py::arg("terms"), py::arg("dx"), py::arg("ldx"),
                                   py::arg("in_scale") = 0);
  def_kernel<linear_4bit_forward_supported>(m, "linear_4bit_forward_supported", py::arg("dtype"), py::arg("M"),
                                            py::arg("K"), py::arg("blocksize"));
  def_kernel<linear_4bit_backward_supported>(m, "linear_4bit_backward_supported", py::arg("dtype"), py::arg("M"),
                                             py::arg("K"), py::arg("blocksize"));

  def_kernel<scale_and_sum_columns>(m, "scale_and_sum_columns", py::arg("u"), py::arg("dtype"), py::arg("M"),
                                    py::arg("N"), py::arg("ldu"), py::arg("v"), py::arg("ldv"), py::arg("scale"),
                                    py::arg("out"), py::arg("ldo"), py::arg("sums"), py::arg("products"));

  def_kernel<wire_lora_shrink>(m, "lora_shrink", py::arg("x"), py::arg("x_dtype"), py::arg("M"), py::arg("K"),
                               py::arg("ldx"), py::arg("P"), py::arg("p_dtype"), py::arg("p_is_kr"), py::arg("r"),
                               py::arg("alpha"), py::arg("dropout_p"), py::arg("seed"), py::arg("S"), py::arg("ldS"));
  def_kernel<wire_lora_wgrad>(m, "lora_wgrad", py::arg("x"), py::arg("x_dtype"), py::arg("M"), py::arg("I"),
                              py::arg("ldx"), py::arg("P"), py::arg("ldP"), py::arg("r"), py::arg("alpha"),
                              py::arg("dropout_p"), py::arg("seed"), py::arg("out"), py::arg("out_dtype"),
                              py::arg("out_is_ri"));
  def_kernel<wire_lora_expand_add>(m, "lora_expand_add", py::arg("out"), py::arg("dtype"), py::arg("M"), py::arg("N"),
                                   py::arg("ldo"), py::arg("terms"));
  def_kernel<wire_philox_mask>(m, "philox_mask", py::arg("seed"), py::arg("M"), py::arg("K"), py::arg("p"),
                               py::arg("out"));

  def_kernel<prompt_embedding_forward>(m, "prompt_embedding_forward", py::arg("ids"), py::arg("batch"),
                                       py::arg("length"), py::arg("weight"), py::arg("vocabulary"),
                                       py::arg("ld_weight"), py::arg("prompt"), py::arg("tokens"), py::arg("ld_prompt"),
                                       py::arg("hidden"), py::arg("dtype"), py::arg("out"));
  def_kernel<prompt_embedding_dprompt>(m, "prompt_embedding_dprompt", py::arg("dy"), py::arg("dtype"), py::arg("batch"),
                                       py::arg("stride_batch"), py::arg("stride_row"), py::arg("out"),
                                       py::arg("out_dtype"), py::arg("tokens"), py::arg("hidden"));
  def_kernel<prompt_embedding_dweight>(
      m, "prompt_embedding_dweight", py::arg("dy"), py::arg("dtype"), py::arg("length"), py::arg("stride_batch"),
      py::arg("stride_row"), py::arg("ids"), py::arg("order"), py::arg("count"), py::arg("out"), py::arg("hidden"));
  def_kernel<prompt_attention_forward>(m, "prompt_attention_forward", py::arg("shape"), py::arg("q"),
                                       py::arg("prompt_k"), py::arg("prompt_v"), py::arg("base"), py::arg("lse"),
                                       py::arg("gate"), py::arg("out"));
  def_kernel<prompt_attention_backward>(m, "prompt_attention_backward", py::arg("shape"), py::arg("dy"), py::arg("q"),
                                        py::arg("prompt_k"), py::arg("prompt_v"), py::arg("out"), py::arg("lse"),
                                        py::arg("gate"), py::arg("dq"), py::arg("add_dq"), py::arg("dprompt_k"),
                                        py::arg("dprompt_v"), py::arg("dgate"));
  def_kernel<wire_bottleneck_forward>(m, "bottleneck_forward", py::arg("adapter"), py::arg("x"), py::arg("M"),
                                      py::arg("ln_eps"), py::arg("residual"), py::arg("y"), py::arg("y_dtype"),
                                      py::arg("z"), py::arg("z_dtype"), py::arg("stats"));
  def_kernel<wire_bottleneck_backward>(m, "bottleneck_backward", py::arg("adapter"), py::arg("x"), py::arg("M"),
                                       py::arg("dy"), py::arg("z"), py::arg("stats"), py::arg("dx_dtype"),
                                       py::arg("gradients"));
}
