// The strings of a GGUF array: a 64-bit little-endian length, then that many bytes of UTF-8, one after the other. A vocabulary and its
// merges are 100,000 of them.
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "native.h"

namespace py = pybind11;

namespace llmcore {
namespace {

// Whole strings of window[at:], at most `count`; with them the place of the first that does not lie whole in the window.
py::tuple gguf_strings(const py::buffer& window, int64_t at, int64_t count) {
    const py::buffer_info info = window.request();
    if (info.itemsize != 1 || info.ndim != 1) throw std::invalid_argument("window must be bytes");
    if (at < 0) throw std::invalid_argument("at must not be negative, got " + std::to_string(at));
    const auto* bytes = static_cast<const char*>(info.ptr);
    py::list found;
    for (int64_t n = 0; n < count; ++n) {
        uint64_t length;
        if (info.size - at < 8) break;
        std::memcpy(&length, bytes + at, 8);
        if (length > static_cast<uint64_t>(info.size - at - 8)) break;
        PyObject* text = PyUnicode_DecodeUTF8(bytes + at + 8, static_cast<Py_ssize_t>(length), nullptr);
        if (text == nullptr) throw py::error_already_set();
        found.append(py::reinterpret_steal<py::str>(text));
        at += 8 + static_cast<int64_t>(length);
    }
    return py::make_tuple(found, at);
}

}  // namespace

void register_gguf_strings(py::module_& m) {
    m.def("gguf_strings", &gguf_strings, py::arg("window"), py::arg("at"), py::arg("count"),
          "(strings, place behind them): the whole strings of window[at:], at most count. UnicodeDecodeError when one is not UTF-8.");
}

}  // namespace llmcore
