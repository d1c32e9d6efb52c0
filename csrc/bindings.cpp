// Schemas of every llmcore tensor operator, and nothing else.
// Implementations register themselves next to their code (STABLE_TORCH_LIBRARY_IMPL in csrc/cpu, csrc/cuda);
// fake and autograd formulas are registered from Python (kernels/<family>.py).
#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(llmcore, m) {
  m.def("extension_info() -> int");
  m.def("zeroth_order_directions(Tensor seeds, int num_directions, int dim, int kind, bool double_precision) -> Tensor");
  m.def("zeroth_order_perturb(Tensor embeddings, Tensor token_mask, Tensor directions, float smoothing, Tensor(a!) out) -> ()");
  m.def("zeroth_order_combine(Tensor seeds, Tensor coefficients, int dim, int kind, bool want_gradient) -> (Tensor, Tensor)");
  m.def(
      "linear_logprob_fwd(Tensor hidden, Tensor rows, Tensor weight, Tensor? bias, Tensor labels, int vocab_start, float logit_scale, "
      "float softcap, float temperature, int want, Tensor(a!) stats, Tensor(b!) argmax, Tensor(c!)? resident, Tensor(d!)? offsets, "
      "Tensor(e!)? direction, Tensor(f!)? store, int kept) -> ()");
  m.def(
      "linear_logprob_bwd(Tensor hidden, Tensor rows, Tensor weight, Tensor? bias, Tensor labels, int vocab_start, float logit_scale, "
      "float softcap, float temperature, Tensor lse, Tensor target, Tensor target_coef, Tensor prob_coef, Tensor? slope, Tensor? resident, "
      "Tensor? offsets, Tensor? slots, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, bool accumulate_weight, "
      "Tensor(c!)? grad_bias, Tensor? store) -> ()");
  m.def(
      "saliency_flow_fwd(Tensor query, Tensor key, Tensor value, Tensor grad, Tensor lse, Tensor low, Tensor high, Tensor? diagonal, Tensor? key_valid, "
      "Tensor row_segment, Tensor column_segment, Tensor pairs, float scale, float softcap, int outputs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("invariants_tile_sums(Tensor a_left, Tensor a_right, Tensor b_left, Tensor b_right, bool symmetric) -> Tensor");
  m.def("invariants_product(Tensor left, Tensor right, float mean, float scale) -> Tensor");
  m.def("invariants_pair_sums(Tensor a, Tensor b) -> Tensor");
  m.def("invariants_count_sketch(Tensor rows, Tensor bins, Tensor signs, int width) -> Tensor");
  m.def("invariants_permuted_dots(Tensor a, Tensor b, Tensor orders) -> Tensor");
  m.def("invariants_sketch_scores(Tensor sketches, Tensor query, int channels) -> Tensor");
}

// The module itself is empty: importing it runs the registrations above.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
