// llmcore._native: native code that is not tensors. Each file of this folder exports one register function; this one calls them.
#include "native.h"

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native code of llmcore that is not tensors: GGUF blocks and strings, pieces of vocabularies, phrase automaton";
    llmcore::register_gguf_blocks(m);
    llmcore::register_gguf_strings(m);
    llmcore::register_token_pieces(m);
    llmcore::register_automaton(m);
}
