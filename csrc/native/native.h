// What the files of this folder register in llmcore._native.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace llmcore {

void register_gguf_blocks(pybind11::module_& m);
void register_gguf_strings(pybind11::module_& m);
void register_token_pieces(pybind11::module_& m);
void register_automaton(pybind11::module_& m);

}  // namespace llmcore
