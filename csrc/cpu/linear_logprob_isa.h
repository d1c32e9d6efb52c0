// The tile kernels of the fused linear log-probability for each instruction set (linear_logprob_tile.h compiled once per set), and the choice of
// one at run time: tile<real>(). The float32 and float64 kernel (linear_logprob.cpp) is written against `Tile` alone.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/cpu_features.h"
#include "cpu/linear_logprob_common.h"

namespace llmcore::linear_logprob {

enum class Storage : int { kReal, kBFloat16, kHalf };

struct RowSums {
  double max = 0, sum = 0, shifted = 0, sum_sq = 0, sum_z = 0;
  int64_t argmax = 0;
};

template <typename real>
struct Tile {
  int64_t nr;
  void (*gemm_rows)(int64_t, int64_t, int64_t, const real*, int64_t, const real*, int64_t, real*, int64_t, int64_t, bool);
  void (*gemm_columns)(int64_t, int64_t, int64_t, const real*, int64_t, const real*, int64_t, real*, int64_t, int64_t, bool);
  void (*convert_row)(const void*, Storage, int64_t, real*);
  void (*transpose_panel)(const real*, int64_t, int64_t, real*);
  void (*pack_row)(const real*, int64_t, real*, int64_t);
  void (*unpack_row)(const real*, int64_t, int64_t, real*);
  void (*finish_logits)(real*, int64_t, const real*, const Transform&);
  void (*row_statistics)(real*, int64_t, int, const Transform&, real*, uint16_t*, bool, RowSums&);
  void (*row_gradient)(const real*, int64_t, const Transform&, const uint16_t*, real, real, real, real, bool, real*, int64_t);
  void (*store_half_row)(const real*, int64_t, uint16_t*, Storage, bool);
  void (*scale_row)(real*, int64_t, real);
  void (*add_column_sums)(const real*, int64_t, int64_t, int64_t, real*);
};

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u)  // subnormal: the addition rounds to nearest even at 2^-24
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

inline uint16_t to_bfloat16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// ---- one lane: float64, and float32 on CPUs without AVX2 ----
template <typename T>
struct Scalar {
  T v;
  static constexpr int kWidth = 1;
  static Scalar load(const T* p) { return {*p}; }
  void store(T* p) const { *p = v; }
  static Scalar load_bfloat16(const uint16_t* p) { return {T(std::bit_cast<float>(uint32_t(*p) << 16))}; }
  void store_bfloat16(uint16_t* p) const { *p = to_bfloat16(static_cast<float>(v)); }
  static Scalar set1(T x) { return {x}; }
  static Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.v * b.v + c.v}; }
  static Scalar add(Scalar a, Scalar b) { return {a.v + b.v}; }
  static Scalar mul(Scalar a, Scalar b) { return {a.v * b.v}; }
  static Scalar max(Scalar a, Scalar b) { return {a.v > b.v ? a.v : b.v}; }
  static Scalar exp(Scalar a) { return {std::exp(a.v)}; }
  static Scalar tanh(Scalar a) { return {std::tanh(a.v)}; }
  T reduce_max() const { return v; }
  T reduce_add() const { return v; }
};

// exp on [-87.3, 88.3]: x = n ln 2 + r, polynomial of degree 6 on |r| <= ln 2 / 2 (1 ulp); below, 0. NaN stays NaN: it is the second operand of min and max.
// tanh: odd polynomial below 0.625, 1 - 2 / (exp(2x) + 1) above.
#define LLMCORE_VECTOR_FUNCTIONS(V)                                                                                    \
  static V exp(V a) {                                                                                                  \
    const V x = V::min(V::set1(88.3f), V::max(V::set1(-87.3f), a));                                                    \
    const V n = V::round(V::mul(x, V::set1(1.44269504088896341f)));                                                    \
    const V r = V::fma(n, V::set1(2.12194440e-4f), V::fma(n, V::set1(-0.693359375f), x));                              \
    V p = V::fma(V::set1(1.9875691500e-4f), r, V::set1(1.3981999507e-3f));                                             \
    p = V::fma(p, r, V::set1(8.3334519073e-3f));                                                                       \
    p = V::fma(p, r, V::set1(4.1665795894e-2f));                                                                       \
    p = V::fma(p, r, V::set1(1.6666665459e-1f));                                                                       \
    p = V::fma(p, r, V::set1(5.0000001201e-1f));                                                                       \
    p = V::add(V::fma(p, V::mul(r, r), r), V::set1(1.0f));                                                             \
    return V::zero_below(V::mul(p, V::power_of_two(n)), a, -87.3f);                                                    \
  }                                                                                                                    \
  static V tanh(V a) {                                                                                                 \
    const V s = V::mul(a, a);                                                                                          \
    V p = V::fma(V::set1(-5.70498872745e-3f), s, V::set1(2.06390887954e-2f));                                          \
    p = V::fma(p, s, V::set1(-5.37397155531e-2f));                                                                     \
    p = V::fma(p, s, V::set1(1.33314422036e-1f));                                                                      \
    p = V::fma(p, s, V::set1(-3.33332819422e-1f));                                                                     \
    const V small = V::fma(V::mul(p, s), a, a);                                                                        \
    const V magnitude = V::absolute(a);                                                                                \
    const V e = V::exp(V::add(magnitude, magnitude));                                                                  \
    const V large = V::fma(V::set1(-2.0f), V::divide(V::set1(1.0f), V::add(e, V::set1(1.0f))), V::set1(1.0f));         \
    return V::select_below(magnitude, 0.625f, small, V::copy_sign(large, a));                                          \
  }

// Standard headers come first: the target pragmas below cover only what is written between them.
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
struct Avx2 {
  __m256 v;
  static constexpr int kWidth = 8;
  static Avx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static Avx2 load_bfloat16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
  }
  // Round to nearest even; NaN gets its quiet bit so that the carry cannot turn it into an infinity.
  void store_bfloat16(uint16_t* p) const {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static Avx2 set1(float x) { return {_mm256_set1_ps(x)}; }
  static Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Avx2 add(Avx2 a, Avx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Avx2 mul(Avx2 a, Avx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Avx2 divide(Avx2 a, Avx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Avx2 max(Avx2 a, Avx2 b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Avx2 min(Avx2 a, Avx2 b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Avx2 round(Avx2 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Avx2 power_of_two(Avx2 n) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
  }
  static Avx2 zero_below(Avx2 x, Avx2 a, float limit) { return {_mm256_andnot_ps(_mm256_cmp_ps(a.v, _mm256_set1_ps(limit), _CMP_LT_OQ), x.v)}; }
  static Avx2 absolute(Avx2 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Avx2 copy_sign(Avx2 a, Avx2 sign) { return {_mm256_or_ps(a.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v))}; }
  static Avx2 select_below(Avx2 a, float limit, Avx2 below, Avx2 otherwise) {
    return {_mm256_blendv_ps(otherwise.v, below.v, _mm256_cmp_ps(a.v, _mm256_set1_ps(limit), _CMP_LT_OQ))};
  }
  float reduce_max() const {
    float lanes[8];
    store(lanes);
    float m = lanes[0];
    for (int i = 1; i < 8; ++i) m = lanes[i] > m ? lanes[i] : m;
    return m;
  }
  double reduce_add() const {
    float lanes[8];
    store(lanes);
    double s = 0;
    for (int i = 0; i < 8; ++i) s += lanes[i];
    return s;
  }
  LLMCORE_VECTOR_FUNCTIONS(Avx2)
};
static inline void half8(const uint16_t* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
static inline void store_half8(const float* from, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void transpose8(const float* from, int64_t ld, float* to, int64_t ld_to) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * ld);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#define TILE_HALF8 half8
#define TILE_STORE_HALF8 store_half8
#define TILE_TRANSPOSE8 transpose8
#define TILE_NAMESPACE avx2
namespace avx2 {
using real = float;
using Vec = Avx2;
constexpr int kMR = 6, kNR = 16;
}  // namespace avx2
#include "cpu/linear_logprob_tile.h"
#undef TILE_NAMESPACE
#pragma GCC pop_options

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own AVX-512 header
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
struct Avx512 {
  __m512 v;
  static constexpr int kWidth = 16;
  static Avx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static Avx512 load_bfloat16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
  }
  void store_bfloat16(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(chosen));
  }
  static Avx512 set1(float x) { return {_mm512_set1_ps(x)}; }
  static Avx512 fma(Avx512 a, Avx512 b, Avx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Avx512 add(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Avx512 mul(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Avx512 divide(Avx512 a, Avx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Avx512 max(Avx512 a, Avx512 b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Avx512 min(Avx512 a, Avx512 b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Avx512 round(Avx512 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Avx512 power_of_two(Avx512 n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
  }
  static Avx512 zero_below(Avx512 x, Avx512 a, float limit) {
    return {_mm512_mask_mov_ps(x.v, _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_LT_OQ), _mm512_setzero_ps())};
  }
  static Avx512 absolute(Avx512 a) { return {_mm512_abs_ps(a.v)}; }
  static Avx512 copy_sign(Avx512 a, Avx512 sign) { return {_mm512_or_ps(a.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign.v))}; }
  static Avx512 select_below(Avx512 a, float limit, Avx512 below, Avx512 otherwise) {
    return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_LT_OQ), below.v)};
  }
  float reduce_max() const {
    float lanes[16];
    store(lanes);
    float m = lanes[0];
    for (int i = 1; i < 16; ++i) m = lanes[i] > m ? lanes[i] : m;
    return m;
  }
  double reduce_add() const {
    float lanes[16];
    store(lanes);
    double s = 0;
    for (int i = 0; i < 16; ++i) s += lanes[i];
    return s;
  }
  LLMCORE_VECTOR_FUNCTIONS(Avx512)
};
#define TILE_NAMESPACE avx512
namespace avx512 {
using real = float;
using Vec = Avx512;
constexpr int kMR = 12, kNR = 32;
}  // namespace avx512
#include "cpu/linear_logprob_tile.h"
#undef TILE_NAMESPACE
#pragma GCC pop_options
#pragma GCC diagnostic pop
#undef TILE_HALF8
#undef TILE_STORE_HALF8
#undef TILE_TRANSPOSE8

#endif

#define TILE_NAMESPACE baseline
namespace baseline {
using real = float;
using Vec = Scalar<float>;
constexpr int kMR = 4, kNR = 8;
}  // namespace baseline
#include "cpu/linear_logprob_tile.h"
#undef TILE_NAMESPACE

#define TILE_NAMESPACE float64
namespace float64 {
using real = double;
using Vec = Scalar<double>;
constexpr int kMR = 4, kNR = 4;
}  // namespace float64
#include "cpu/linear_logprob_tile.h"
#undef TILE_NAMESPACE

template <typename real>
const Tile<real>& tile();
template <>
inline const Tile<double>& tile<double>() { return float64::kTile; }
template <>
inline const Tile<float>& tile<float>() {
#if defined(__x86_64__)
  if (cpu_level() >= CpuLevel::kAvx512) return avx512::kTile;
  if (cpu_level() >= CpuLevel::kAvx2) return avx2::kTile;
#endif
  return baseline::kTile;
}

}  // namespace llmcore::linear_logprob
