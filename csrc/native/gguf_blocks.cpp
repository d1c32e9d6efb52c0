// De-quantisation of GGUF blocks to float32.
//
// A row of weights is stored as blocks of 32 or 256 weights: small integers q, one or two half-precision scales, and for the 256-blocks
// integer scales of groups of 16 or 32. A weight is d * q, d * q + m or d * q - m; every product and sum is rounded to float32 on its own
// (no fused multiply-add), which makes the result equal, bit for bit, to the format's reference on every machine.
// Threads: none here; the interpreter lock is released, so callers may split rows among threads.
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "native.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace py = pybind11;

namespace llmcore {
namespace {

float half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    uint32_t bits;
    float value;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact in float32
        value = float(mantissa) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    }
    std::memcpy(&value, &bits, 4);
    return value;
}

uint32_t word(const uint8_t* p) {
    uint32_t v;
    std::memcpy(&v, p, 4);
    return v;
}

// Each format: weights per block, bytes per block, and one block.

struct Q4_0 {
    static constexpr int weights = 32, bytes = 18;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b);
        for (int i = 0; i < 16; ++i) {
            out[i] = d * float(int(b[2 + i] & 15) - 8);
            out[i + 16] = d * float(int(b[2 + i] >> 4) - 8);
        }
    }
};

struct Q4_1 {
    static constexpr int weights = 32, bytes = 20;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b), m = half(b + 2);
        for (int i = 0; i < 16; ++i) {
            out[i] = d * float(b[4 + i] & 15) + m;
            out[i + 16] = d * float(b[4 + i] >> 4) + m;
        }
    }
};

struct Q5_0 {
    static constexpr int weights = 32, bytes = 22;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b);
        const uint32_t high = word(b + 2);
        for (int i = 0; i < 16; ++i) {
            out[i] = d * float(int((b[6 + i] & 15) | ((high >> i & 1) << 4)) - 16);
            out[i + 16] = d * float(int((b[6 + i] >> 4) | ((high >> (i + 16) & 1) << 4)) - 16);
        }
    }
};

struct Q5_1 {
    static constexpr int weights = 32, bytes = 24;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b), m = half(b + 2);
        const uint32_t high = word(b + 4);
        for (int i = 0; i < 16; ++i) {
            out[i] = d * float((b[8 + i] & 15) | ((high >> i & 1) << 4)) + m;
            out[i + 16] = d * float((b[8 + i] >> 4) | ((high >> (i + 16) & 1) << 4)) + m;
        }
    }
};

struct Q8_0 {
    static constexpr int weights = 32, bytes = 34;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b);
        for (int i = 0; i < 32; ++i) out[i] = d * float(int8_t(b[2 + i]));
    }
};

constexpr float iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IQ4_NL {
    static constexpr int weights = 32, bytes = 18;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b);
        for (int i = 0; i < 16; ++i) {
            out[i] = d * iq4_values[b[2 + i] & 15];
            out[i + 16] = d * iq4_values[b[2 + i] >> 4];
        }
    }
};

struct IQ4_XS {  // 8 groups of 32; six-bit scales: low nibbles in bytes 4..7, high pairs in the 16-bit word at 2
    static constexpr int weights = 256, bytes = 136;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b);
        const uint32_t high = b[2] | uint32_t(b[3]) << 8;
        for (int g = 0; g < 8; ++g) {
            const int scale = (b[4 + g / 2] >> (4 * (g & 1)) & 15) | ((high >> (2 * g) & 3) << 4);
            const float dl = d * float(scale - 32);
            const uint8_t* q = b + 8 + 16 * g;
            for (int i = 0; i < 16; ++i) {
                out[32 * g + i] = dl * iq4_values[q[i] & 15];
                out[32 * g + i + 16] = dl * iq4_values[q[i] >> 4];
            }
        }
    }
};

struct Q2_K {  // 16 groups of 16: scale and minimum share a byte; quarter j of a half-block is bits 2j, 2j + 1 of its 32 bytes
    static constexpr int weights = 256, bytes = 84;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b + 80), dmin = half(b + 82);
        for (int g = 0; g < 16; ++g) {
            const float dl = d * float(b[g] & 15), ml = dmin * float(b[g] >> 4);
            const uint8_t* q = b + 16 + 32 * (g / 8) + 16 * (g & 1);
            const int shift = 2 * (g / 2 % 4);
            for (int i = 0; i < 16; ++i) out[16 * g + i] = dl * float(q[i] >> shift & 3) - ml;
        }
    }
};

struct Q3_K {  // as Q2_K without minima; the third bit is in a mask of 32 bytes, one bit plane per 32 weights, set meaning "do not subtract 4"
    static constexpr int weights = 256, bytes = 110;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b + 108);
        const uint8_t* packed = b + 96;
        for (int g = 0; g < 16; ++g) {
            const int low = g < 8 ? packed[g] & 15 : packed[g - 8] >> 4, high = packed[8 + g % 4] >> (2 * (g / 4)) & 3;
            const float dl = d * float((low | high << 4) - 32);
            const uint8_t* q = b + 32 + 32 * (g / 8) + 16 * (g & 1);
            const uint8_t* mask = b + 16 * (g & 1);
            const int shift = 2 * (g / 2 % 4), plane = g / 2;
            for (int i = 0; i < 16; ++i) out[16 * g + i] = dl * float(int(q[i] >> shift & 3) - ((mask[i] >> plane & 1) ? 0 : 4));
        }
    }
};

// The twelve bytes of Q4_K and Q5_K: eight six-bit scales and eight six-bit minima.
void k_scale(const uint8_t* s, int g, float& scale, float& minimum) {
    if (g < 4) {
        scale = float(s[g] & 63);
        minimum = float(s[4 + g] & 63);
    } else {
        scale = float((s[4 + g] & 15) | (s[g - 4] >> 6) << 4);
        minimum = float((s[4 + g] >> 4) | (s[g] >> 6) << 4);
    }
}

struct Q4_K {
    static constexpr int weights = 256, bytes = 144;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b), dmin = half(b + 2);
        for (int g = 0; g < 8; ++g) {
            float scale, minimum;
            k_scale(b + 4, g, scale, minimum);
            const float dl = d * scale, ml = dmin * minimum;
            const uint8_t* q = b + 16 + 32 * (g / 2);
            const int shift = 4 * (g & 1);
            for (int i = 0; i < 32; ++i) out[32 * g + i] = dl * float(q[i] >> shift & 15) - ml;
        }
    }
};

struct Q5_K {
    static constexpr int weights = 256, bytes = 176;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b), dmin = half(b + 2);
        for (int g = 0; g < 8; ++g) {
            float scale, minimum;
            k_scale(b + 4, g, scale, minimum);
            const float dl = d * scale, ml = dmin * minimum;
            const uint8_t* q = b + 48 + 32 * (g / 2);
            const uint8_t* high = b + 16;
            const int shift = 4 * (g & 1);
            for (int i = 0; i < 32; ++i) out[32 * g + i] = dl * float((q[i] >> shift & 15) | (high[i] >> g & 1) << 4) - ml;
        }
    }
};

struct Q6_K {  // halves of 128: 64 bytes of nibbles (32 low, 32 low of the next, then the high ones) and 32 bytes of bit pairs; signed scales
    static constexpr int weights = 256, bytes = 210;
    static void block(const uint8_t* b, float* out) {
        const float d = half(b + 208);
        for (int g = 0; g < 16; ++g) {
            const float dl = d * float(int8_t(b[192 + g]));
            const int part = g % 8 / 2;  // which 32 of the half-block
            const uint8_t* low = b + 64 * (g / 8) + 32 * (part & 1) + 16 * (g & 1);
            const uint8_t* high = b + 128 + 32 * (g / 8) + 16 * (g & 1);
            for (int i = 0; i < 16; ++i) out[16 * g + i] = dl * float(int((low[i] >> (4 * (part / 2)) & 15) | (high[i] >> (2 * part) & 3) << 4) - 32);
        }
    }
};

template <class Format>
void blocks(const uint8_t* raw, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) Format::block(raw + i * Format::bytes, out + i * Format::weights);
}

struct Entry {
    const char* name;
    int weights, bytes;
    void (*run)(const uint8_t*, int64_t, float*);
};

#define LLMCORE_FORMAT(F) {#F, F::weights, F::bytes, blocks<F>}
constexpr Entry formats[] = {LLMCORE_FORMAT(Q4_0), LLMCORE_FORMAT(Q4_1), LLMCORE_FORMAT(Q5_0), LLMCORE_FORMAT(Q5_1), LLMCORE_FORMAT(Q8_0),
                             LLMCORE_FORMAT(Q2_K), LLMCORE_FORMAT(Q3_K), LLMCORE_FORMAT(Q4_K), LLMCORE_FORMAT(Q5_K), LLMCORE_FORMAT(Q6_K),
                             LLMCORE_FORMAT(IQ4_NL), LLMCORE_FORMAT(IQ4_XS)};
#undef LLMCORE_FORMAT

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

void gguf_dequantize(const Bytes& raw, const std::string& type_name, Floats& out) {
    for (const Entry& format : formats) {
        if (type_name != format.name) continue;
        if (raw.ndim() != 1 || raw.size() % format.bytes != 0)
            throw std::invalid_argument("raw must be 1-D and whole " + type_name + " blocks of " + std::to_string(format.bytes) +
                                        " bytes, got " + std::to_string(raw.size()));
        const int64_t count = raw.size() / format.bytes;
        if (out.ndim() != 1 || out.size() != count * format.weights)
            throw std::invalid_argument("out must be 1-D float32 with " + std::to_string(count * format.weights) + " elements, got " +
                                        std::to_string(out.size()));
        const uint8_t* source = raw.data();
        float* target = out.mutable_data();
        {
            py::gil_scoped_release release;
            format.run(source, count, target);
        }
        return;
    }
    throw std::invalid_argument("type_name " + type_name + " is not a block format");
}

}  // namespace

void register_gguf_blocks(py::module_& m) {
    m.def("gguf_dequantize", &gguf_dequantize, py::arg("raw").noconvert(), py::arg("type_name"), py::arg("out").noconvert(),
          "Raw blocks (bytes,) uint8 of one GGUF type into float32 (weights,).");
}

}  // namespace llmcore
