// The bytes that the pieces of a vocabulary stand for, 50,000 to 250,000 of them a tokenizer; methods/huref/tokens.py says the same, piece
// by piece, where nothing is compiled.
#include <cstdint>
#include <string>

#include "native.h"

namespace py = pybind11;

namespace llmcore {
namespace {

// Byte of a character of byte-level BPE, -1 when it stands for none: printable Latin-1 is itself, the others follow from U+0100 on.
struct ByteAlphabet {
    int16_t of[512];
    ByteAlphabet() {
        int next = 256;
        for (int16_t& entry : of) entry = -1;
        for (int byte = 0; byte < 256; ++byte) {
            const bool printable = (byte >= 33 && byte < 127) || (byte >= 161 && byte < 173) || byte >= 174;
            of[printable ? byte : next++] = static_cast<int16_t>(byte);
        }
    }
};

int hex(Py_UCS4 c) { return c >= '0' && c <= '9' ? int(c - '0') : c >= 'A' && c <= 'F' ? int(c - 'A') + 10 : c >= 'a' && c <= 'f' ? int(c - 'a') + 10 : -1; }

void append_utf8(std::string& out, Py_UCS4 c) {  // a lone surrogate is written as if it were a character
    if (c < 0x80) {
        out += static_cast<char>(c);
    } else if (c < 0x800) {
        out += static_cast<char>(0xC0 | (c >> 6)), out += static_cast<char>(0x80 | (c & 63));
    } else if (c < 0x10000) {
        out += static_cast<char>(0xE0 | (c >> 12)), out += static_cast<char>(0x80 | ((c >> 6) & 63)), out += static_cast<char>(0x80 | (c & 63));
    } else {
        out += static_cast<char>(0xF0 | (c >> 18)), out += static_cast<char>(0x80 | ((c >> 12) & 63));
        out += static_cast<char>(0x80 | ((c >> 6) & 63)), out += static_cast<char>(0x80 | (c & 63));
    }
}

py::list token_bytes(const py::iterable& pieces, bool byte_level) {
    static const ByteAlphabet alphabet;
    py::list found;
    std::string text;
    for (const py::handle piece : pieces) {
        if (!PyUnicode_Check(piece.ptr())) throw py::type_error("pieces must be str, got " + std::string(Py_TYPE(piece.ptr())->tp_name));
        const Py_ssize_t length = PyUnicode_GET_LENGTH(piece.ptr());
        const int kind = PyUnicode_KIND(piece.ptr());
        const void* data = PyUnicode_DATA(piece.ptr());
        const auto at = [&](Py_ssize_t i) { return PyUnicode_READ(kind, data, i); };
        text.clear();
        if (length == 6 && at(0) == '<' && at(1) == '0' && at(2) == 'x' && at(5) == '>' && hex(at(3)) >= 0 && hex(at(4)) >= 0) {
            text += static_cast<char>(hex(at(3)) * 16 + hex(at(4)));
        } else {
            bool spelled = byte_level;
            for (Py_ssize_t i = 0; spelled && i < length; ++i) {
                const Py_UCS4 c = at(i);
                spelled = c < 512 && alphabet.of[c] >= 0;
                if (spelled) text += static_cast<char>(alphabet.of[c]);
            }
            if (!spelled) {
                text.clear();
                for (Py_ssize_t i = 0; i < length; ++i) append_utf8(text, at(i) == 0x2581 ? ' ' : at(i));
            }
        }
        found.append(py::bytes(text));
    }
    return found;
}

}  // namespace

void register_token_pieces(py::module_& m) {
    m.def("token_bytes", &token_bytes, py::arg("pieces"), py::arg("byte_level"), "Byte string of every piece of a vocabulary.");
}

}  // namespace llmcore
