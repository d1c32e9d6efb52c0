// Zeroth-order gradients on the CPU.
//
//   zeroth_order_directions  (S, P, D) rows drawn from (seed, row, element): Philox4x32-10, Box-Muller in double precision, rounded once
//   zeroth_order_perturb     out[b, p, t] = embeddings[b, t] + mu * directions[b, p] where the mask is set, else a copy of the row
//   zeroth_order_combine     sum_p c[b, p] u[b, p] and its squared norm, directions regenerated, nothing of size P*D stored
//
// Parallel split: rows of the table; (query, token) rows, each written for every direction while it is in L1; (query, segment of D).
// Numerics: float32 operands are added with one rounding (fused multiply-add), 16-bit ones in float32 and rounded once, float64 in float64.
// Output larger than the caches is written with non-temporal stores: it would be evicted before anyone reads it, and a plain store first
// reads the line it overwrites (a third of the traffic).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/cpu_features.h"
#include "common/philox.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define LLMCORE_INLINE inline __attribute__((always_inline))

enum Kind : int64_t { kGaussian = 0, kSphere = 1, kAntithetic = 2 };

constexpr int kBlocks = 16;               // Philox counters drawn together: enough for any vector width
constexpr int kChunk = 4 * kBlocks;       // normals they give
constexpr int64_t kSegment = 16 * kChunk; // elements of D that one task of combine owns
static_assert(kSegment % kChunk == 0, "a segment starts at a chunk, or its counters would not be whole");
constexpr int64_t kStreamBytes = 8 << 20; // output above this bypasses the caches

LLMCORE_INLINE uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }
LLMCORE_INLINE double double_of(uint64_t x) { return __builtin_bit_cast(double, x); }

// log x for 2^-33 < x < 1, to an ulp or two: x = m 2^k with m in [0.707, 1.414), log m = 2 atanh((m - 1) / (m + 1)).
LLMCORE_INLINE double log_unit(double x) {
  const uint64_t shifted = bits_of(x) + (0x3ff0000000000000ull - 0x3fe6a09e00000000ull);
  // The exponent as a double through the mantissa of 2^52: AVX2 has no 64-bit integer conversion.
  const double k = double_of((shifted >> 52) | 0x4330000000000000ull) - (4503599627370496.0 + 1023.0);
  const double f = double_of((shifted & 0x000fffffffffffffull) + 0x3fe6a09e00000000ull) - 1.0;
  const double s = f / (2.0 + f), z = s * s;
  double series = 1.0 / 23;
  series = series * z + 1.0 / 21;
  series = series * z + 1.0 / 19;
  series = series * z + 1.0 / 17;
  series = series * z + 1.0 / 15;
  series = series * z + 1.0 / 13;
  series = series * z + 1.0 / 11;
  series = series * z + 1.0 / 9;
  series = series * z + 1.0 / 7;
  series = series * z + 1.0 / 5;
  series = series * z + 1.0 / 3;
  return k * 0.693147180369123816490 + (2.0 * s + (2.0 * s * z * series + k * 1.90821492927058770002e-10));
}

// cos and sin of 2 pi u, 0 < u < 1. The quarter turn is split off exactly: 4u and its nearest integer are exact in double.
LLMCORE_INLINE void cos_sin_turn(double u, double& cosine, double& sine) {
  const double quarters = 4.0 * u, magic = 6755399441055744.0;
  const double q = (quarters + magic) - magic;
  const double t = (quarters - q) * 1.57079632679489661923, t2 = t * t;
  double s = 1.0 / 355687428096000.0;
  s = s * t2 - 1.0 / 1307674368000.0;
  s = s * t2 + 1.0 / 6227020800.0;
  s = s * t2 - 1.0 / 39916800.0;
  s = s * t2 + 1.0 / 362880.0;
  s = s * t2 - 1.0 / 5040.0;
  s = s * t2 + 1.0 / 120.0;
  s = s * t2 - 1.0 / 6.0;
  s = t + t * t2 * s;
  double c = 1.0 / 20922789888000.0;
  c = c * t2 - 1.0 / 87178291200.0;
  c = c * t2 + 1.0 / 479001600.0;
  c = c * t2 - 1.0 / 3628800.0;
  c = c * t2 + 1.0 / 40320.0;
  c = c * t2 - 1.0 / 720.0;
  c = c * t2 + 1.0 / 24.0;
  c = 1.0 - (0.5 * t2 - t2 * t2 * c);
  const bool odd = (q == 1.0) | (q == 3.0), left = (q == 1.0) | (q == 2.0), lower = (q == 2.0) | (q == 3.0);
  const double x = odd ? s : c, y = odd ? c : s;
  cosine = left ? -x : x;
  sine = lower ? -y : y;
}

// kChunk normals: elements 4 * first_block … of direction `row`.
LLMCORE_INLINE void gaussian_chunk(uint64_t seed, uint32_t row, uint32_t first_block, double* __restrict out) {
  uint32_t words[4][kBlocks];
  for (int i = 0; i < kBlocks; ++i) {
    const llmcore::PhiloxWords w = llmcore::philox(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), first_block + i, row, 0,
                                                   llmcore::kDirectionStream);
    for (int lane = 0; lane < 4; ++lane) words[lane][i] = w.x[lane];
  }
  double normals[4][kBlocks];
  for (int pair = 0; pair < 4; pair += 2) {
    for (int i = 0; i < kBlocks; ++i) {
      // x + 1/2 through a signed conversion (the unsigned one has no vector form before AVX-512); exact.
      const double u0 = (static_cast<double>(static_cast<int32_t>(words[pair][i] ^ 0x80000000u)) + 2147483648.5) * 0x1p-32;
      const double u1 = (static_cast<double>(static_cast<int32_t>(words[pair + 1][i] ^ 0x80000000u)) + 2147483648.5) * 0x1p-32;
      const double radius = __builtin_sqrt(-2.0 * log_unit(u0));
      double cosine, sine;
      cos_sin_turn(u1, cosine, sine);
      normals[pair][i] = radius * cosine;
      normals[pair + 1][i] = radius * sine;
    }
  }
  for (int i = 0; i < kBlocks; ++i)
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = normals[lane][i];
}

// One row of `dim` doubles times `factor`; returns the sum of squares before the factor.
LLMCORE_INLINE double gaussian_row(uint64_t seed, uint32_t row, int64_t dim, double factor, double* out) {
  double chunk[kChunk], squares = 0;
  for (int64_t start = 0; start < dim; start += kChunk) {
    gaussian_chunk(seed, row, static_cast<uint32_t>(start / 4), chunk);
    const int64_t count = std::min<int64_t>(kChunk, dim - start);
    for (int64_t i = 0; i < count; ++i) {
      squares += chunk[i] * chunk[i];
      out[start + i] = chunk[i] * factor;
    }
  }
  return squares;
}

// Segment [start, start + count) of sum_p c_p float32(u_p); returns its sum of squares.
LLMCORE_INLINE double combine_segment(uint64_t seed, const double* coefficients, int64_t directions, bool antithetic, int64_t start, int64_t count,
                                      double* out) {
  double squares = 0;
  const int64_t drawn = antithetic ? directions / 2 : directions;
  for (int64_t offset = 0; offset < count; offset += kChunk) {
    double total[kChunk] = {}, chunk[kChunk];
    for (int64_t p = 0; p < drawn; ++p) {
      gaussian_chunk(seed, static_cast<uint32_t>(p), static_cast<uint32_t>((start + offset) / 4), chunk);
      const double c = antithetic ? coefficients[p] - coefficients[p + drawn] : coefficients[p];
      for (int i = 0; i < kChunk; ++i) total[i] += c * static_cast<double>(static_cast<float>(chunk[i]));
    }
    const int64_t used = std::min<int64_t>(kChunk, count - offset);
    for (int64_t i = 0; i < used; ++i) squares += total[i] * total[i];
    if (out != nullptr) std::memcpy(out + offset, total, used * sizeof(double));
  }
  return squares;
}

template <typename T>
LLMCORE_INLINE void shifted(const T* __restrict e, const float* __restrict u, double mu, T* __restrict out, int64_t count) {
  if constexpr (sizeof(T) == 8) {
    for (int64_t i = 0; i < count; ++i) out[i] = e[i] + mu * static_cast<double>(u[i]);
  } else {
    const float m = static_cast<float>(mu);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<float>(e[i]) + m * u[i]);
  }
}

// One body, three instruction sets.
#if defined(__x86_64__)
#define LLMCORE_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LLMCORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#define LLMCORE_MULTIVERSION(result, name, body, parameters, arguments)                                                    \
  LLMCORE_AVX512 result name##_avx512 parameters { return body arguments; }                                                \
  LLMCORE_AVX2 result name##_avx2 parameters { return body arguments; }                                                    \
  result name##_baseline parameters { return body arguments; }                                                             \
  result name parameters {                                                                                                 \
    const auto level = llmcore::cpu_level();                                                                               \
    if (level >= llmcore::CpuLevel::kAvx512) return name##_avx512 arguments;                                               \
    return level >= llmcore::CpuLevel::kAvx2 ? name##_avx2 arguments : name##_baseline arguments;                          \
  }
#else
#define LLMCORE_MULTIVERSION(result, name, body, parameters, arguments) \
  result name parameters { return body arguments; }
#endif

LLMCORE_MULTIVERSION(double, draw_row, gaussian_row, (uint64_t seed, uint32_t row, int64_t dim, double factor, double* out),
                     (seed, row, dim, factor, out))
LLMCORE_MULTIVERSION(double, combine, combine_segment,
                     (uint64_t seed, const double* c, int64_t directions, bool antithetic, int64_t start, int64_t count, double* out),
                     (seed, c, directions, antithetic, start, count, out))
LLMCORE_MULTIVERSION(void, shift_float, shifted<float>, (const float* e, const float* u, double mu, float* out, int64_t n), (e, u, mu, out, n))
LLMCORE_MULTIVERSION(void, shift_double, shifted<double>, (const double* e, const float* u, double mu, double* out, int64_t n), (e, u, mu, out, n))
LLMCORE_MULTIVERSION(void, shift_bfloat16, shifted<c10::BFloat16>, (const c10::BFloat16* e, const float* u, double mu, c10::BFloat16* out, int64_t n),
                     (e, u, mu, out, n))

// float16 needs the conversion instructions by name: the compiler does not vectorise the library type's bit arithmetic.
void shift_half_baseline(const c10::Half* e, const float* u, double mu, c10::Half* out, int64_t n) { shifted(e, u, mu, out, n); }

#if defined(__x86_64__)
LLMCORE_AVX512 void shift_half_avx512(const c10::Half* e, const float* u, double mu, c10::Half* out, int64_t n) {
  const __m512 m = _mm512_set1_ps(static_cast<float>(mu));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 inside = n - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512 wide = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(inside, e + i));
    const __m512 moved = _mm512_fmadd_ps(m, _mm512_maskz_loadu_ps(inside, u + i), wide);
    _mm256_mask_storeu_epi16(out + i, inside, _mm512_cvtps_ph(moved, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

LLMCORE_AVX2 void shift_half_avx2(const c10::Half* e, const float* u, double mu, c10::Half* out, int64_t n) {
  const __m256 m = _mm256_set1_ps(static_cast<float>(mu));
  const auto eight = [&](const void* half, const float* row) __attribute__((always_inline, target("avx2,fma,f16c"))) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(half)));
    return _mm256_cvtps_ph(_mm256_fmadd_ps(m, _mm256_loadu_ps(row), wide), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), eight(e + i, u + i));
  if (i < n) {
    c10::Half half[8] = {};
    float row[8] = {};
    std::memcpy(half, e + i, (n - i) * sizeof(c10::Half));
    std::memcpy(row, u + i, (n - i) * sizeof(float));
    const __m128i moved = eight(half, row);
    std::memcpy(out + i, &moved, (n - i) * sizeof(c10::Half));
  }
}
#endif

void shift_half(const c10::Half* e, const float* u, double mu, c10::Half* out, int64_t n) {
#if defined(__x86_64__)
  const auto level = llmcore::cpu_level();
  if (level >= llmcore::CpuLevel::kAvx512) return shift_half_avx512(e, u, mu, out, n);
  if (level >= llmcore::CpuLevel::kAvx2) return shift_half_avx2(e, u, mu, out, n);
#endif
  shift_half_baseline(e, u, mu, out, n);
}

void shift_row(const float* e, const float* u, double mu, float* out, int64_t n) { shift_float(e, u, mu, out, n); }
void shift_row(const double* e, const float* u, double mu, double* out, int64_t n) { shift_double(e, u, mu, out, n); }
void shift_row(const c10::BFloat16* e, const float* u, double mu, c10::BFloat16* out, int64_t n) { shift_bfloat16(e, u, mu, out, n); }
void shift_row(const c10::Half* e, const float* u, double mu, c10::Half* out, int64_t n) { shift_half(e, u, mu, out, n); }

// Copy `bytes` past the caches. Both ends 16-byte aligned.
void stream_copy(const void* from, void* to, int64_t bytes) {
#if defined(__x86_64__)
  const auto* source = static_cast<const char*>(from);
  auto* target = static_cast<char*>(to);
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    for (int part = 0; part < 64; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + part), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + part)));
  }
  std::memcpy(target + i, source + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

Tensor zeroth_order_directions(Tensor seeds, int64_t num_directions, int64_t dim, int64_t kind, bool double_precision) {
  STD_TORCH_CHECK(seeds.is_cpu() && seeds.dim() == 1 && seeds.is_contiguous() && seeds.scalar_type() == ScalarType::Long,
                  "zeroth_order_directions: seeds must be contiguous (S,) int64 on the CPU");
  STD_TORCH_CHECK(num_directions >= 0 && dim >= 1 && kind >= kGaussian && kind <= kAntithetic, "zeroth_order_directions: bad size or kind");
  const int64_t count = seeds.size(0);
  Tensor rows = torch::stable::empty({count, num_directions, dim}, double_precision ? ScalarType::Double : ScalarType::Float);
  const auto* seed = seeds.const_data_ptr<int64_t>();
  void* data = rows.mutable_data_ptr();
  const int64_t half = num_directions / 2;
  torch::stable::parallel_for(0, count * num_directions, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> wide(dim);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t j = unit % num_directions;
      const bool mirrored = kind == kAntithetic && j >= half;
      const double squares = draw_row(static_cast<uint64_t>(seed[unit / num_directions]), static_cast<uint32_t>(mirrored ? j - half : j), dim,
                                      mirrored ? -1.0 : 1.0, wide.data());
      if (kind == kSphere) {
        const double factor = std::sqrt(static_cast<double>(dim)) / std::sqrt(squares);
        for (double& value : wide) value *= factor;
      }
      if (double_precision) {
        std::memcpy(static_cast<double*>(data) + unit * dim, wide.data(), dim * sizeof(double));
      } else {
        std::transform(wide.begin(), wide.end(), static_cast<float*>(data) + unit * dim, [](double value) { return static_cast<float>(value); });
      }
    }
  });
  return rows;
}

template <typename T>
void perturb(const Tensor& embeddings, const Tensor& mask, const Tensor& table, double mu, Tensor& out) {
  const int64_t B = embeddings.size(0), T_ = embeddings.size(1), D = embeddings.size(2), P = out.size(1);
  const auto* e = static_cast<const T*>(embeddings.const_data_ptr());
  const auto* moves = static_cast<const bool*>(mask.const_data_ptr());
  const auto* u = table.const_data_ptr<float>();
  auto* o = static_cast<T*>(out.mutable_data_ptr());
  const int64_t e_b = embeddings.stride(0), e_t = embeddings.stride(1), o_b = out.stride(0), o_p = out.stride(1), o_t = out.stride(2);
  const int64_t u_b = table.size(0) == 1 ? 0 : P * D, row_bytes = D * static_cast<int64_t>(sizeof(T));
  const auto aligned = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
  const bool stream = B * P * T_ * row_bytes > kStreamBytes && reinterpret_cast<uintptr_t>(o) % 16 == 0 && aligned(o_b) && aligned(o_p) && aligned(o_t);
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, P * row_bytes));
  torch::stable::parallel_for(0, B * T_, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 4096 / sizeof(T);
    alignas(64) T piece[kPiece];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / T_, t = unit % T_;
      const T* source = e + b * e_b + t * e_t;
      for (int64_t p = 0; p < P; ++p) {
        T* target = o + b * o_b + p * o_p + t * o_t;
        const float* row = u + b * u_b + p * D;
        if (!moves[unit]) {
          stream ? stream_copy(source, target, row_bytes) : void(std::memcpy(target, source, row_bytes));
        } else if (!stream) {
          shift_row(source, row, mu, target, D);
        } else {
          for (int64_t start = 0; start < D; start += kPiece) {
            const int64_t count = std::min(kPiece, D - start);
            shift_row(source + start, row + start, mu, piece, count);
            stream_copy(piece, target + start, count * static_cast<int64_t>(sizeof(T)));
          }
        }
      }
    }
#if defined(__x86_64__)
    if (stream) _mm_sfence();  // streaming stores are weakly ordered: finish them before another thread is told
#endif
  });
}

void zeroth_order_perturb(Tensor embeddings, Tensor token_mask, Tensor table, double smoothing, Tensor out) {
  STD_TORCH_CHECK(embeddings.is_cpu() && token_mask.is_cpu() && table.is_cpu() && out.is_cpu(), "zeroth_order_perturb: tensors must be on the CPU");
  STD_TORCH_CHECK(embeddings.dim() == 3 && token_mask.dim() == 2 && table.dim() == 3 && out.dim() == 4, "zeroth_order_perturb: wrong number of dimensions");
  const int64_t B = embeddings.size(0), T = embeddings.size(1), D = embeddings.size(2), P = out.size(1);
  STD_TORCH_CHECK(token_mask.size(0) == B && token_mask.size(1) == T && token_mask.scalar_type() == ScalarType::Bool && token_mask.is_contiguous(),
                  "zeroth_order_perturb: token_mask must be contiguous (B, T) bool");
  STD_TORCH_CHECK((table.size(0) == 1 || table.size(0) == B) && table.size(1) == P && table.size(2) == D && table.is_contiguous() &&
                      table.scalar_type() == ScalarType::Float,
                  "zeroth_order_perturb: directions must be contiguous (1 or B, P, D) float32");
  STD_TORCH_CHECK(out.size(0) == B && out.size(2) == T && out.size(3) == D && out.scalar_type() == embeddings.scalar_type(),
                  "zeroth_order_perturb: out must be (B, P, T, D) of the embeddings' dtype");
  STD_TORCH_CHECK((embeddings.stride(2) == 1 && out.stride(3) == 1) || D == 1, "zeroth_order_perturb: the last stride must be 1");
  switch (embeddings.scalar_type()) {
    case ScalarType::Float: return perturb<float>(embeddings, token_mask, table, smoothing, out);
    case ScalarType::Double: return perturb<double>(embeddings, token_mask, table, smoothing, out);
    case ScalarType::BFloat16: return perturb<c10::BFloat16>(embeddings, token_mask, table, smoothing, out);
    case ScalarType::Half: return perturb<c10::Half>(embeddings, token_mask, table, smoothing, out);
    default: STD_TORCH_CHECK(false, "zeroth_order_perturb: dtype must be float32, float64, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> zeroth_order_combine(Tensor seeds, Tensor coefficients, int64_t dim, int64_t kind, bool want_gradient) {
  STD_TORCH_CHECK(seeds.is_cpu() && seeds.dim() == 1 && seeds.is_contiguous() && seeds.scalar_type() == ScalarType::Long,
                  "zeroth_order_combine: seeds must be contiguous (B,) int64 on the CPU");
  STD_TORCH_CHECK(coefficients.is_cpu() && coefficients.dim() == 2 && coefficients.is_contiguous() && coefficients.size(0) == seeds.size(0) &&
                      coefficients.scalar_type() == ScalarType::Double,
                  "zeroth_order_combine: coefficients must be contiguous (B, P) float64 on the CPU");
  STD_TORCH_CHECK(dim >= 1 && (kind == kGaussian || kind == kAntithetic), "zeroth_order_combine: kind must be gaussian or antithetic");
  const int64_t B = seeds.size(0), P = coefficients.size(1), segments = (dim + kSegment - 1) / kSegment;
  Tensor square = torch::stable::empty({B}, ScalarType::Double);
  Tensor gradient = torch::stable::empty({B, want_gradient ? dim : 0}, ScalarType::Double);
  const auto* seed = seeds.const_data_ptr<int64_t>();
  const auto* c = coefficients.const_data_ptr<double>();
  auto* g = want_gradient ? gradient.mutable_data_ptr<double>() : nullptr;
  std::vector<double> partial(B * segments);
  torch::stable::parallel_for(0, B * segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / segments, start = unit % segments * kSegment, count = std::min(kSegment, dim - start);
      partial[unit] = combine(static_cast<uint64_t>(seed[b]), c + b * P, P, kind == kAntithetic, start, count, g ? g + b * dim + start : nullptr);
    }
  });
  // Segments are added in their order, whatever thread made them.
  auto* total = square.mutable_data_ptr<double>();
  for (int64_t b = 0; b < B; ++b) {
    total[b] = 0;
    for (int64_t s = 0; s < segments; ++s) total[b] += partial[b * segments + s];
  }
  return {square, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("zeroth_order_directions", TORCH_BOX(&zeroth_order_directions));
  m.impl("zeroth_order_perturb", TORCH_BOX(&zeroth_order_perturb));
  m.impl("zeroth_order_combine", TORCH_BOX(&zeroth_order_combine));
}
