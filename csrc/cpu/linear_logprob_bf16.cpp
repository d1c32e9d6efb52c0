// Fused linear log-probability for bfloat16 operands on CPUs with bfloat16 dot products: AMX tiles, or AVX-512 where there are none.
//
// Everything is kept transposed, vocabulary rows by tokens, in panels of 32 tokens:
//   Z^T (512 x 32) = W H^T      W's rows are the tile operand as they lie in memory; H^T is packed once into pairs of hidden columns
//   statistics, d a^T           tokens are lanes: maxima and sums are vertical, no lane ever meets another
//   dH^T (d x 32) += W^T da^T   W^T of one vocabulary block is transposed once and serves every panel
//   dW (32 x 32) = da^T H       over all tokens inside the tile registers: no float32 dW exists, each element is rounded once as it is stored
// Every product is the sum over K in order of one kernel shape (32 x 32), whatever the batch: a token's bits depend on nothing but its row, for
// any number of threads. Logits, statistics and dH are float32 (sums over the vocabulary float64); da and kept exponentials are bfloat16.
#include "cpu/linear_logprob_bf16.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/cpu_features.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llmcore::linear_logprob {

#if !defined(__x86_64__)
bool bf16_available() { return false; }
void bf16_forward(const Bf16Head&, const Bf16Forward&) {}
void bf16_backward(const Bf16Head&, const Bf16Backward&) {}
#else

bool bf16_available() { return cpu_level() >= CpuLevel::kAvx512Bf16; }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma")

namespace {

constexpr int64_t kLanes = 32;               // tokens of a panel
constexpr int64_t kPanelZ = kBlock * kLanes;  // a panel's logits of one vocabulary block

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- products: C (32 x 32) = or += A (32 x 32k, rows) · B (two groups of 16 columns, each [16k pairs][16][2]) ----

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((noinline)) void product_amx(const uint16_t* a, int64_t lda, const uint16_t* b0, const uint16_t* b1, int64_t k, float* c, int64_t ldc, bool add) {
  __asm__ volatile("" ::: "memory");
  const int64_t a_stride = lda * 2, c_stride = ldc * 4;
  if (add) {
    _tile_loadd(0, c, c_stride);
    _tile_loadd(1, c + 16, c_stride);
    _tile_loadd(2, c + 16 * ldc, c_stride);
    _tile_loadd(3, c + 16 * ldc + 16, c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t* lower = a + 16 * lda;
  for (int64_t i = 0; i < k; ++i) {
    _tile_loadd(4, a + 32 * i, a_stride);
    _tile_loadd(6, b0 + 512 * i, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1 + 512 * i, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + 32 * i, a_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 16, c_stride);
  _tile_stored(2, c + 16 * ldc, c_stride);
  _tile_stored(3, c + 16 * ldc + 16, c_stride);
  __asm__ volatile("" ::: "memory");
}

template <int mr>
inline void product_dot_rows(const uint16_t* a, int64_t lda, const uint16_t* b0, const uint16_t* b1, int64_t k, float* c, int64_t ldc, bool add) {
  __m512 acc[mr][2];
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i) {
    acc[i][0] = add ? _mm512_loadu_ps(c + i * ldc) : _mm512_setzero_ps();
    acc[i][1] = add ? _mm512_loadu_ps(c + i * ldc + 16) : _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < 16 * k; ++p) {
    const __m512bh v0 = (__m512bh)_mm512_loadu_si512(b0 + 32 * p), v1 = (__m512bh)_mm512_loadu_si512(b1 + 32 * p);
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * lda + 2 * p, 4);
      const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], w, v0);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], w, v1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i) {
    _mm512_storeu_ps(c + i * ldc, acc[i][0]);
    _mm512_storeu_ps(c + i * ldc + 16, acc[i][1]);
  }
}

__attribute__((noinline)) void product_dot(const uint16_t* a, int64_t lda, const uint16_t* b0, const uint16_t* b1, int64_t k, float* c, int64_t ldc, bool add) {
  product_dot_rows<12>(a, lda, b0, b1, k, c, ldc, add);
  product_dot_rows<12>(a + 12 * lda, lda, b0, b1, k, c + 12 * ldc, ldc, add);
  product_dot_rows<8>(a + 24 * lda, lda, b0, b1, k, c + 24 * ldc, ldc, add);
}

// Tile registers exist in a thread between its constructor and destructor.
struct Products {
  const bool amx = cpu_has_amx();
  Products() {
    static const TileConfig config;
    if (amx) _tile_loadconfig(&config);
  }
  ~Products() {
    if (amx) _tile_release();
  }
  void operator()(const uint16_t* a, int64_t lda, const uint16_t* b0, const uint16_t* b1, int64_t k, float* c, int64_t ldc, bool add) const {
    (amx ? product_amx : product_dot)(a, lda, b0, b1, k, c, ldc, add);
  }
};

// ---- lanes ----

// exp(x) to 1e-7 for x <= 88; below -87 the smallest normal number. 2^f by a minimax polynomial on |f| <= 1/2. NaN stays NaN.
inline __m512 exp_fast(__m512 x) {
  const __m512 log2e = _mm512_set1_ps(1.44269504088896341f), magic = _mm512_set1_ps(12582912.0f);
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
  const __m512 shifted = _mm512_fmadd_ps(x, log2e, magic), f = _mm512_fmsub_ps(x, log2e, _mm512_sub_ps(shifted, magic));
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.3276471993e-03f), f, _mm512_set1_ps(9.6755413345e-03f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5507132735e-02f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022119724e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314696706e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000000717f));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

// Odd polynomial below 0.625, 1 - 2 / (exp(2x) + 1) above.
inline __m512 tanh_fast(__m512 a) {
  const __m512 s = _mm512_mul_ps(a, a), magnitude = _mm512_abs_ps(a), one = _mm512_set1_ps(1.0f);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(-5.70498872745e-3f), s, _mm512_set1_ps(2.06390887954e-2f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-5.37397155531e-2f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(1.33314422036e-1f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-3.33332819422e-1f));
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(p, s), a, a);
  const __m512 e = exp_fast(_mm512_min_ps(_mm512_set1_ps(80.0f), _mm512_add_ps(magnitude, magnitude)));
  const __m512 large = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), _mm512_div_ps(one, _mm512_add_ps(e, one)), one);
  const __m512 sign = _mm512_and_ps(_mm512_set1_ps(-0.0f), a);
  const __mmask16 below = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0.625f), _CMP_NGE_UQ);
  return _mm512_mask_mov_ps(_mm512_or_ps(large, sign), below, small);
}

inline __m512i pack_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
inline __m512 unpack_low(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16)); }
inline __m512 unpack_high(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16)); }

inline uint16_t round_bf16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// da^T's pairs of vocabulary rows are interleaved by unpack instructions: column c of group g holds this token of the panel.
constexpr int64_t token_of_column(int64_t group, int64_t c) { return c / 4 * 8 + group * 4 + c % 4; }

// ---- one call ----

struct Bf16Call {
  const Bf16Head& h;
  const int64_t padded_d, panels;
  std::vector<int64_t> lane_row;  // scored row of each lane, or -1
  const bool weight_direct;       // full tiles of W can be read where they lie

  Bf16Call(const Bf16Head& head, std::vector<int64_t> lanes)
      : h(head), padded_d(round_up(head.d, 32)), panels(static_cast<int64_t>(lanes.size()) / kLanes), lane_row(std::move(lanes)), weight_direct(head.d % 32 == 0) {}

  int64_t worker_floats() const { return kPanelZ + kPanelZ / 2 + 16 * padded_d + 2048; }
  const uint16_t* hidden_of(int64_t lane) const { return lane_row[lane] < 0 ? nullptr : h.hidden + h.rows[lane_row[lane]] * h.hidden_ld; }

  static __m512i chunk(const uint16_t* row, int64_t from, int64_t size) {  // 32 elements, zeros past the row's end or without a row
    if (row == nullptr || from >= size) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(size - from >= 32 ? ~__mmask32(0) : (__mmask32(1) << (size - from)) - 1, row + from);
  }

  // H^T of a panel in pairs of hidden columns: two groups of [padded_d / 2][16 tokens][2].
  void pack_hidden_pairs(int64_t panel, uint16_t* out) const {
    for (int64_t g = 0; g < 2; ++g)
      for (int64_t k = 0; k < padded_d; k += 32) {
        __m512i r[16];
        for (int64_t i = 0; i < 16; ++i) r[i] = chunk(hidden_of(panel * kLanes + g * 16 + i), k, h.d);
        transpose16(r);
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + (g * padded_d / 2 + k / 2 + i) * 32, r[i]);
      }
  }

  // H of a panel in pairs of tokens: for each group of 16 hidden columns [panels * 16 pairs][16][2], this panel's part.
  void pack_token_pairs(int64_t panel, uint16_t* out) const {
    const int64_t group = panels * 16 * 32;
    for (int64_t pair = 0; pair < 16; ++pair) {
      const uint16_t *even = hidden_of(panel * kLanes + 2 * pair), *odd = hidden_of(panel * kLanes + 2 * pair + 1);
      for (int64_t k = 0; k < padded_d; k += 32) {
        const __m512i a = chunk(even, k, h.d), b = chunk(odd, k, h.d);
        for (int64_t half = 0; half < 2; ++half) {
          const __m512i low = _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a));
          const __m512i high = _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(b, 1) : _mm512_castsi512_si256(b));
          _mm512_store_si512(out + (k / 16 + half) * group + (panel * 16 + pair) * 32, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
      }
    }
  }

  // Rows [first, first + 32) of W as a tile operand: in place, or a copy padded with zeros.
  const uint16_t* weight_rows(int64_t first, uint16_t* copy, int64_t& ld) const {
    if (weight_direct && first + 32 <= h.v) {
      ld = h.weight_ld;
      return h.weight + first * h.weight_ld;
    }
    ld = padded_d;
    for (int64_t r = 0; r < 32; ++r)
      for (int64_t k = 0; k < padded_d; k += 32)
        _mm512_storeu_si512(copy + r * padded_d + k, chunk(first + r < h.v ? h.weight + (first + r) * h.weight_ld : nullptr, k, h.d));
    return copy;
  }

  // W^T of vocabulary rows [first, first + 32): out[k][column .. column + 32), row pitch `ld`.
  void transpose_weight(int64_t first, uint16_t* out, int64_t ld) const {
    for (int64_t k = 0; k < padded_d; k += 32) {
      __m512i low[16], high[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t v = first + 2 * i;
        const __m512i a = chunk(v < h.v ? h.weight + v * h.weight_ld : nullptr, k, h.d), b = chunk(v + 1 < h.v ? h.weight + (v + 1) * h.weight_ld : nullptr, k, h.d);
        low[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(a)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(b)), 16));
        high[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(a, 1)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1)), 16));
      }
      transpose16(low);
      transpose16(high);
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_store_si512(out + (k + i) * ld, low[i]);
        _mm512_store_si512(out + (k + 16 + i) * ld, high[i]);
      }
    }
  }

  // Final logits of 32 vocabulary rows of a panel, in place.
  void finish(float* z, int64_t first, int64_t count) const {
    if (h.bias == nullptr && h.transform.identity) return;
    const Transform& t = h.transform;
    const __m512 scale = _mm512_set1_ps(float(t.logit_scale)), inverse_cap = _mm512_set1_ps(float(t.softcap ? 1 / t.softcap : 0)),
                 cap = _mm512_set1_ps(float(t.softcap)), inverse_temperature = _mm512_set1_ps(float(1 / t.temperature));
    for (int64_t r = 0; r < count; ++r) {
      const __m512 b = _mm512_set1_ps(h.bias ? h.bias[first + r] : 0.0f);
      for (int64_t q = 0; q < kLanes; q += 16) {
        __m512 x = _mm512_mul_ps(_mm512_add_ps(_mm512_load_ps(z + r * kLanes + q), b), scale);
        if (t.softcap) x = _mm512_mul_ps(cap, tanh_fast(_mm512_mul_ps(x, inverse_cap)));
        _mm512_store_ps(z + r * kLanes + q, _mm512_mul_ps(x, inverse_temperature));
      }
    }
  }

  // Final logits of vocabulary rows [start, start + count), count <= kBlock, of one packed panel.
  void logits(const Products& product, const uint16_t* packed, int64_t start, int64_t count, float* z, uint16_t* copy) const {
    for (int64_t r = 0; r < count; r += 32) {
      int64_t ld = 0;
      const uint16_t* a = weight_rows(start + r, copy, ld);
      product(a, ld, packed, packed + padded_d * 16, padded_d / 32, z + r * kLanes, kLanes, false);
      finish(z + r * kLanes, start + r, std::min<int64_t>(32, count - r));
    }
  }

  // dH^T of a panel += W^T da^T over `pairs` of vocabulary rows (a multiple of 16).
  void add_hidden(const Products& product, const uint16_t* transposed, int64_t ld, const uint16_t* da_pairs, int64_t pairs, float* panel_sum, bool add) const {
    for (int64_t k = 0; k < padded_d; k += 32)
      product(transposed + k * ld, ld, da_pairs, da_pairs + kBlock * 16, pairs / 16, panel_sum + k * kLanes, kLanes, add);
  }

  // Rows of dH from a panel's dH^T, scaled by `scale` per lane when given. Not in place.
  void untranspose(const float* panel_sum, int64_t panel, const float* scale, float* out) const {
    for (int64_t g = 0; g < 2; ++g)
      for (int64_t k = 0; k < h.d; k += 16) {
        __m512i r[16];
        for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_load_si512(panel_sum + (k + i) * kLanes + g * 16);
        transpose16(r);
        const __mmask16 mask = h.d - k >= 16 ? 0xffff : (1u << (h.d - k)) - 1;
        for (int64_t c = 0; c < 16; ++c) {
          const int64_t token = token_of_column(g, c), row = lane_row[panel * kLanes + token];
          if (row < 0) continue;
          const __m512 x = _mm512_castsi512_ps(r[c]);
          _mm512_mask_storeu_ps(out + row * h.d + k, mask, scale ? _mm512_mul_ps(x, _mm512_set1_ps(scale[token])) : x);
        }
      }
  }
};

// Per-lane values in the column order of da's pairs.
inline void in_column_order(const float* lanes, float* columns) {
  for (int64_t g = 0; g < 2; ++g)
    for (int64_t c = 0; c < 16; ++c) columns[g * 16 + c] = lanes[token_of_column(g, c)];
}

// Two vocabulary rows of da^T of a panel, (rows x 32 tokens) in bfloat16, into the pair operand of dH^T.
inline void store_pairs(__m512i even, __m512i odd, int64_t pair, uint16_t* da_pairs) {
  _mm512_store_si512(da_pairs + pair * 32, _mm512_unpacklo_epi16(even, odd));
  _mm512_store_si512(da_pairs + kBlock * 16 + pair * 32, _mm512_unpackhi_epi16(even, odd));
}

struct PanelSums {  // of one panel and one vocabulary block
  alignas(64) float max[kLanes], sum[kLanes];
  double shifted[kLanes], sum_sq[kLanes], sum_z[kLanes];
  int64_t argmax[kLanes];
};

// Second-order sums of a block, asked for by `want`.
void other_sums(const float* z, int64_t count, int want, PanelSums& s) {
  alignas(64) float e[kLanes];
  for (int64_t q = 0; q < kLanes; ++q) s.shifted[q] = s.sum_sq[q] = s.sum_z[q] = 0, s.argmax[q] = -1;
  for (int64_t r = 0; r < count; ++r) {
    const float* row = z + r * kLanes;
    for (int64_t q = 0; q < kLanes; q += 16) _mm512_store_ps(e + q, exp_fast(_mm512_sub_ps(_mm512_load_ps(row + q), _mm512_load_ps(s.max + q))));
    for (int64_t q = 0; q < kLanes; ++q) {
      if (want & kEntropy) s.shifted[q] += double(e[q]) * (double(row[q]) - double(s.max[q]));
      if (want & kSumSq) s.sum_sq[q] += double(e[q]) * double(e[q]);
      if (want & kMean) s.sum_z[q] += row[q];
      if ((want & kArgmax) && s.argmax[q] < 0 && row[q] == s.max[q]) s.argmax[q] = r;
    }
  }
}

}  // namespace

void bf16_forward(const Bf16Head& h, const Bf16Forward& out) {
  std::vector<int64_t> lanes(round_up(h.m, kLanes), -1);
  for (int64_t i = 0; i < h.m; ++i) lanes[i] = i;
  const Bf16Call call(h, std::move(lanes));
  const int64_t panels = call.panels, d = call.padded_d, tiles = (h.v + kBlock - 1) / kBlock;
  const bool direction = out.direction != nullptr;
  // Blocks of one round are independent; their partial sums are merged in order afterwards.
  const int64_t round = direction ? 1 : std::max<int64_t>(4, std::min<int64_t>(64, (8 * h.threads + panels - 1) / panels));
  Buffer<uint16_t> packed(panels * d * kLanes), transposed(direction ? d * (kBlock + 32) : 0);
  Buffer<float> worker_floats(h.threads * call.worker_floats()), sums(direction ? panels * d * kLanes : 0), anchor(direction ? panels * kLanes : 0);
  Buffer<PanelSums> partial(round * panels);
  double *row_max = out.stats, *sum = row_max + h.m, *target = row_max + 2 * h.m, *shifted = row_max + 3 * h.m, *sum_sq = row_max + 4 * h.m,
         *sum_z = row_max + 5 * h.m;
  std::fill(row_max, row_max + h.m, -std::numeric_limits<double>::infinity());
  std::fill(sum, sum + 5 * h.m, 0.0);
  if (out.argmax != nullptr) std::fill(out.argmax, out.argmax + h.m, h.vocab_start);
  if (direction) std::fill(anchor.get(), anchor.get() + panels * kLanes, -std::numeric_limits<float>::infinity());
  run_tasks(panels, h.threads, [&](int64_t p, int64_t) { call.pack_hidden_pairs(p, packed.get() + p * d * kLanes); });
  const float chain = float(h.transform.logit_scale / h.transform.temperature);
  const float cap_ratio = h.transform.softcap ? float(h.transform.temperature / h.transform.softcap) : 0.0f;

  const auto panel_block = [&](int64_t p, int64_t tile, PanelSums& s, int64_t worker) {
    const Products product;
    const int64_t start = tile * kBlock, count = std::min(kBlock, h.v - start);
    float* z = worker_floats.get() + worker * call.worker_floats();
    uint16_t* pairs = reinterpret_cast<uint16_t*>(z + kPanelZ);
    call.logits(product, packed.get() + p * d * kLanes, start, count, z, pairs + kPanelZ);
    __m512 m0 = _mm512_load_ps(z), m1 = _mm512_load_ps(z + 16);
    for (int64_t r = 1; r < count; ++r) {
      m0 = _mm512_max_ps(_mm512_load_ps(z + r * kLanes), m0);
      m1 = _mm512_max_ps(_mm512_load_ps(z + r * kLanes + 16), m1);
    }
    _mm512_store_ps(s.max, m0);
    _mm512_store_ps(s.max + 16, m1);
    if (out.want) other_sums(z, count, out.want, s);
    for (int64_t i = p * kLanes; i < std::min(h.m, (p + 1) * kLanes); ++i) {
      const int64_t local = h.label[i] - h.vocab_start - start;
      if (local >= 0 && local < count) target[i] = z[local * kLanes + i - p * kLanes];
    }
    const int64_t first = p * kLanes, width = std::min(kLanes, out.kept - first);  // lanes whose exponentials stay
    uint16_t* kept = width > 0 ? out.resident + first * h.v + start * width : nullptr;
    const __mmask32 kept_mask = width >= kLanes ? ~__mmask32(0) : width > 0 ? (__mmask32(1) << width) - 1 : 0;
    for (int64_t q = 0; q < width; ++q) out.offset[(first + q) * tiles + tile] = s.max[q];

    // The direction's exponentials are relative to an anchor that follows the running maximum in steps, so that sums are seldom rescaled.
    __m512 f0 = _mm512_setzero_ps(), f1 = f0;
    float* panel_sum = direction ? sums.get() + p * d * kLanes : nullptr;
    if (direction) {
      alignas(64) float factor[kLanes], moved[kLanes], ordered[kLanes];
      float* at = anchor.get() + first;
      bool any = false;
      for (int64_t q = 0; q < kLanes; ++q) {
        moved[q] = 1.0f;
        if (!(s.max[q] <= at[q] + 8.0f)) {
          moved[q] = tile > 0 ? std::exp(at[q] - s.max[q]) : 0.0f;
          at[q] = s.max[q];
          any = true;
        }
        factor[q] = std::exp(s.max[q] - at[q]) * chain;
      }
      if (any && tile > 0) {
        in_column_order(moved, ordered);
        const __m512 o0 = _mm512_load_ps(ordered), o1 = _mm512_load_ps(ordered + 16);
        for (int64_t k = 0; k < d; ++k) {
          _mm512_store_ps(panel_sum + k * kLanes, _mm512_mul_ps(_mm512_load_ps(panel_sum + k * kLanes), o0));
          _mm512_store_ps(panel_sum + k * kLanes + 16, _mm512_mul_ps(_mm512_load_ps(panel_sum + k * kLanes + 16), o1));
        }
      }
      f0 = _mm512_load_ps(factor);
      f1 = _mm512_load_ps(factor + 16);
    }
    __m512 a0 = _mm512_setzero_ps(), a1 = a0, b0 = a0, b1 = a0;
    const __m512 ratio = _mm512_set1_ps(cap_ratio), one = _mm512_set1_ps(1.0f);
    const auto half_row = [&](int64_t r, int64_t q, __m512 m, __m512 f, __m512& into, __m512& da) {
      const __m512 x = _mm512_load_ps(z + r * kLanes + q), e = exp_fast(_mm512_sub_ps(x, m));
      into = _mm512_add_ps(into, e);
      if (direction) {
        da = _mm512_mul_ps(e, f);
        if (cap_ratio != 0) {
          const __m512 t = _mm512_mul_ps(x, ratio);
          da = _mm512_mul_ps(da, _mm512_fnmadd_ps(t, t, one));
        }
      }
      return e;
    };
    const int64_t padded = round_up(count, 32);
    for (int64_t r = 0; r < (direction ? padded : round_up(count, 2)); r += 2) {
      __m512 d0, d1, d2, d3;
      __m512i even = _mm512_setzero_si512(), odd = even;
      if (r < count) {
        const __m512 e0 = half_row(r, 0, m0, f0, a0, d0), e1 = half_row(r, 16, m1, f1, a1, d1);
        if (kept != nullptr) _mm512_mask_storeu_epi16(kept + r * width, kept_mask, pack_bf16(e0, e1));
        if (direction) even = pack_bf16(d0, d1);
      }
      if (r + 1 < count) {
        const __m512 e0 = half_row(r + 1, 0, m0, f0, b0, d2), e1 = half_row(r + 1, 16, m1, f1, b1, d3);
        if (kept != nullptr) _mm512_mask_storeu_epi16(kept + (r + 1) * width, kept_mask, pack_bf16(e0, e1));
        if (direction) odd = pack_bf16(d2, d3);
      }
      if (direction) store_pairs(even, odd, r / 2, pairs);
    }
    _mm512_store_ps(s.sum, _mm512_add_ps(a0, b0));
    _mm512_store_ps(s.sum + 16, _mm512_add_ps(a1, b1));
    if (direction) call.add_hidden(product, transposed.get(), kBlock + 32, pairs, padded / 2, panel_sum, tile > 0);
  };

  const auto merge = [&](int64_t p, int64_t tile, const PanelSums& s) {
    const int64_t first = p * kLanes, width = std::min(kLanes, h.m - first);
    alignas(64) float old_scale[kLanes] = {}, new_scale[kLanes] = {}, top[kLanes] = {};
    for (int64_t q = 0; q < width; ++q) {
      top[q] = std::max(static_cast<float>(row_max[first + q]), s.max[q]);
      // While the sum is 0 the old maximum is -inf and must not enter a difference.
      old_scale[q] = tile > 0 ? static_cast<float>(row_max[first + q]) - top[q] : 0.0f;
      new_scale[q] = s.max[q] - top[q];
    }
    alignas(64) float a[kLanes], b[kLanes];
    for (int64_t q = 0; q < kLanes; q += 16) {  // exp(0) is 1 to the last bit here, so an unchanged maximum changes no sum
      const __m512 x = _mm512_load_ps(old_scale + q), y = _mm512_load_ps(new_scale + q), zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
      _mm512_store_ps(a + q, _mm512_mask_mov_ps(exp_fast(x), _mm512_cmp_ps_mask(x, zero, _CMP_EQ_OQ), one));
      _mm512_store_ps(b + q, _mm512_mask_mov_ps(exp_fast(y), _mm512_cmp_ps_mask(y, zero, _CMP_EQ_OQ), one));
    }
    for (int64_t q = 0; q < width; ++q) {
      const int64_t i = first + q;
      if (out.want & kEntropy) shifted[i] = a[q] * (shifted[i] + old_scale[q] * sum[i]) + b[q] * (s.shifted[q] + double(new_scale[q]) * s.sum[q]);
      sum[i] = double(a[q]) * sum[i] + double(b[q]) * s.sum[q];
      if (out.want & kSumSq) sum_sq[i] = double(a[q]) * a[q] * sum_sq[i] + double(b[q]) * b[q] * s.sum_sq[q];
      if (out.want & kMean) sum_z[i] += s.sum_z[q];
      if (out.argmax != nullptr && s.argmax[q] >= 0 && (tile == 0 || s.max[q] > row_max[i])) out.argmax[i] = h.vocab_start + tile * kBlock + s.argmax[q];
      row_max[i] = top[q];
    }
  };

  for (int64_t tile = 0; tile < tiles; tile += round) {
    const int64_t blocks = std::min(round, tiles - tile);
    if (direction)
      run_tasks((std::min(kBlock, h.v - tile * kBlock) + 31) / 32, h.threads,
                [&](int64_t t, int64_t) { call.transpose_weight(tile * kBlock + t * 32, transposed.get() + t * 32, kBlock + 32); });
    run_tasks(blocks * panels, h.threads, [&](int64_t t, int64_t worker) { panel_block(t % panels, tile + t / panels, partial.get()[t], worker); });
    run_tasks(panels, h.threads, [&](int64_t p, int64_t) {
      for (int64_t b = 0; b < blocks; ++b) merge(p, tile + b, partial.get()[b * panels + p]);
    });
  }
  if (direction)
    run_tasks(panels, h.threads, [&](int64_t p, int64_t) {
      float scale[kLanes] = {};
      for (int64_t i = p * kLanes; i < std::min(h.m, (p + 1) * kLanes); ++i)
        scale[i - p * kLanes] = static_cast<float>(std::exp(double(anchor.get()[i]) - row_max[i]));
      call.untranspose(sums.get() + p * d * kLanes, p, scale, out.direction);
    });
}

void bf16_backward(const Bf16Head& h, const Bf16Backward& io) {
  // Kept rows keep the panel of the forward, so that its exponentials are read as they lie; panels without a living row are dropped.
  std::vector<int64_t> lanes, source;  // source: the kept panel of each panel, or -1
  int64_t row = 0;
  for (; row < h.m && io.kept > 0 && io.slots[row] >= 0; ++row) {
    const int64_t panel = io.slots[row] / kLanes;
    if (source.empty() || source.back() != panel) {
      source.push_back(panel);
      lanes.resize(lanes.size() + kLanes, -1);
    }
    lanes[lanes.size() - kLanes + io.slots[row] % kLanes] = row;
  }
  for (int64_t q = 0; row < h.m; ++row, ++q) {
    if (q % kLanes == 0) {
      source.push_back(-1);
      lanes.resize(lanes.size() + kLanes, -1);
    }
    lanes[lanes.size() - kLanes + q % kLanes] = row;
  }
  const Bf16Call call(h, std::move(lanes));
  const int64_t panels = call.panels, d = call.padded_d, tiles = (h.v + kBlock - 1) / kBlock, da_ld = panels * kLanes + 32;
  const bool needs_hidden = io.grad_hidden != nullptr, needs_weight = io.grad_weight != nullptr;
  bool recomputes = false;
  for (const int64_t s : source) recomputes |= s < 0;
  Buffer<uint16_t> packed(recomputes ? panels * d * kLanes : 0), token_pairs(needs_weight ? panels * d * kLanes : 0);
  Buffer<uint16_t> transposed(needs_hidden ? d * (kBlock + 32) : 0), da(needs_weight ? kBlock * da_ld : 0);
  // A panel's dH^T takes the place of its rows of dH when they are the same memory: full panels in order, no padding.
  bool in_place = needs_hidden && h.d == d;
  for (int64_t i = 0; i < panels * kLanes && in_place; ++i) in_place = call.lane_row[i] == i;
  in_place = in_place && reinterpret_cast<uintptr_t>(io.grad_hidden) % 64 == 0;
  Buffer<float> own_sums(needs_hidden && !in_place ? panels * d * kLanes : 0), worker_floats(h.threads * call.worker_floats());
  Buffer<float> panel_swap(needs_hidden && in_place ? h.threads * d * kLanes : 0), bias_sums(io.grad_bias ? panels * kBlock : 0);
  float* sums = in_place ? io.grad_hidden : own_sums.get();

  run_tasks(panels, h.threads, [&](int64_t p, int64_t) {
    if (source[p] < 0) call.pack_hidden_pairs(p, packed.get() + p * d * kLanes);
    if (needs_weight) call.pack_token_pairs(p, token_pairs.get());
  });
  const auto transpose = [&](int64_t start, int64_t t) { call.transpose_weight(start + t * 32, transposed.get() + t * 32, kBlock + 32); };
  if (needs_hidden) run_tasks((std::min(kBlock, h.v) + 31) / 32, h.threads, [&](int64_t t, int64_t) { transpose(0, t); });

  const double chain = h.transform.logit_scale / h.transform.temperature;
  const float cap_ratio = h.transform.softcap ? float(h.transform.temperature / h.transform.softcap) : 0.0f;
  const bool plain = io.slope == nullptr && cap_ratio == 0;

  const auto panel_block = [&](int64_t p, int64_t start, int64_t worker) {
    const Products product;
    const int64_t count = std::min(kBlock, h.v - start), padded = round_up(count, 32), tile = start / kBlock;
    float* z = worker_floats.get() + worker * call.worker_floats();
    uint16_t* pairs = reinterpret_cast<uint16_t*>(z + kPanelZ);
    const int64_t* lane_row = call.lane_row.data() + p * kLanes;
    alignas(64) float lse[kLanes], beta[kLanes], slope[kLanes], rescale[kLanes], offset[kLanes];
    __mmask32 alive = 0;
    for (int64_t q = 0; q < kLanes; ++q) {
      const int64_t i = lane_row[q];
      alive |= __mmask32(i >= 0) << q;
      lse[q] = i >= 0 ? io.lse[i] : 0.0f;
      beta[q] = i >= 0 ? static_cast<float>(-chain) * io.prob_coef[i] : 0.0f;
      slope[q] = i >= 0 && io.slope ? static_cast<float>(-chain) * io.slope[i] : 0.0f;
      offset[q] = i >= 0 && source[p] >= 0 ? io.offset[io.slots[i] * tiles + tile] : 0.0f;
      rescale[q] = std::exp(offset[q] - lse[q]);
    }
    const int64_t first = source[p] * kLanes, width = source[p] >= 0 ? std::min(kLanes, io.kept - first) : 0;
    const uint16_t* kept = source[p] >= 0 ? io.resident + first * h.v + start * width : nullptr;
    const __mmask32 kept_mask = width >= kLanes ? ~__mmask32(0) : (__mmask32(1) << width) - 1;
    if (kept == nullptr) call.logits(product, packed.get() + p * d * kLanes, start, count, z, pairs + kPanelZ);
    const __m512 l[2] = {_mm512_load_ps(lse), _mm512_load_ps(lse + 16)};
    const __m512 c[2] = {_mm512_load_ps(beta), _mm512_load_ps(beta + 16)};
    const __m512 s[2] = {_mm512_load_ps(slope), _mm512_load_ps(slope + 16)};
    const __m512 f[2] = {_mm512_mul_ps(_mm512_load_ps(rescale), c[0]), _mm512_mul_ps(_mm512_load_ps(rescale + 16), c[1])};
    const __mmask16 live[2] = {static_cast<__mmask16>(alive), static_cast<__mmask16>(alive >> 16)};

    // da of half a vocabulary row. A dead lane's operands may be anything; its da is 0.
    const auto half_row = [&](int64_t r, int half) {
      const int64_t q = 16 * half;
      if (plain) {
        if (kept == nullptr) return _mm512_maskz_mul_ps(live[half], exp_fast(_mm512_sub_ps(_mm512_load_ps(z + r * kLanes + q), l[half])), c[half]);
        const __m512i both = _mm512_maskz_loadu_epi16(kept_mask, kept + r * width);
        return _mm512_maskz_mul_ps(live[half], half ? unpack_high(both) : unpack_low(both), f[half]);
      }
      __m512 x, probability;
      if (kept == nullptr) {
        x = _mm512_load_ps(z + r * kLanes + q);
        probability = exp_fast(_mm512_sub_ps(x, l[half]));
      } else {
        const __m512i both = _mm512_maskz_loadu_epi16(kept_mask, kept + r * width);
        const __m512 e = half ? unpack_high(both) : unpack_low(both);
        probability = _mm512_mul_ps(e, _mm512_load_ps(rescale + q));
        alignas(64) float values[16];
        _mm512_store_ps(values, e);
        for (int64_t j = 0; j < 16; ++j) values[j] = values[j] > 0 ? std::log(values[j]) + offset[q + j] : lse[q + j];
        x = _mm512_load_ps(values);
      }
      __m512 out = _mm512_mul_ps(probability, _mm512_fmadd_ps(s[half], x, c[half]));
      if (cap_ratio != 0) {
        const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(cap_ratio));
        out = _mm512_mul_ps(out, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0f)));
      }
      return _mm512_maskz_mov_ps(live[half], out);
    };
    float* bias_sum = io.grad_bias ? bias_sums.get() + p * kBlock : nullptr;
    uint16_t* da_panel = da.get() + p * kLanes;
    for (int64_t r = 0; r < padded; r += 2) {
      __m512i two[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t j = 0; j < 2 && r + j < count; ++j) {
        const __m512 low = half_row(r + j, 0), high = half_row(r + j, 1);
        two[j] = pack_bf16(low, high);
        if (bias_sum != nullptr) bias_sum[r + j] = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
        if (needs_weight) _mm512_store_si512(da_panel + (r + j) * da_ld, two[j]);
      }
      store_pairs(two[0], two[1], r / 2, pairs);
    }
    for (int64_t q = 0; q < kLanes; ++q) {  // the label's entry from the exact target logit: 1 - p cancels
      const int64_t i = lane_row[q], local = i < 0 ? -1 : h.label[i] - h.vocab_start - start;
      if (local < 0 || local >= count) continue;
      const double p_label = std::exp(double(io.target[i]) - double(io.lse[i])), t = io.target[i] * double(cap_ratio);
      const double exact = (io.target_coef[i] - p_label * (io.prob_coef[i] + (io.slope ? double(io.slope[i]) * io.target[i] : 0.0))) * chain * (1 - t * t);
      const uint16_t rounded = round_bf16(static_cast<float>(exact));
      const int64_t group = q / 4 % 2, column = q / 8 * 4 + q % 4;
      uint16_t& in_pairs = pairs[group * kBlock * 16 + local / 2 * 32 + column * 2 + local % 2];
      if (bias_sum != nullptr) bias_sum[local] += static_cast<float>(exact) - std::bit_cast<float>(uint32_t(in_pairs) << 16);
      in_pairs = rounded;
      if (needs_weight) da_panel[local * da_ld + q] = rounded;
    }
    if (needs_hidden) call.add_hidden(product, transposed.get(), kBlock + 32, pairs, padded / 2, sums + p * d * kLanes, start > 0);
  };

  // dW of 32 vocabulary rows and hidden columns [from, to).
  const auto weight_rows = [&](int64_t start, int64_t local, int64_t from, int64_t to, int64_t worker) {
    const Products product;
    float* tile = worker_floats.get() + worker * call.worker_floats();
    const int64_t group = panels * 16 * 32, count = std::min<int64_t>(32, h.v - start - local);
    for (int64_t k = from; k < to; k += 32) {
      product(da.get() + local * da_ld, da_ld, token_pairs.get() + k / 16 * group, token_pairs.get() + (k / 16 + 1) * group, panels, tile, 32, false);
      const int64_t width = std::min<int64_t>(32, h.d - k);
      const __mmask32 mask = width >= 32 ? ~__mmask32(0) : (__mmask32(1) << width) - 1;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (start + local + r) * io.grad_weight_ld + k;
        __m512 low = _mm512_load_ps(tile + r * 32), high = _mm512_load_ps(tile + r * 32 + 16);
        if (io.grad_weight_is_float) {
          float* out = static_cast<float*>(io.grad_weight) + at;
          const __mmask16 m0 = static_cast<__mmask16>(mask), m1 = static_cast<__mmask16>(mask >> 16);
          if (io.accumulate) {
            low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(m0, out));
            high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(m1, out + 16));
          }
          _mm512_mask_storeu_ps(out, m0, low);
          _mm512_mask_storeu_ps(out + 16, m1, high);
        } else {
          uint16_t* out = static_cast<uint16_t*>(io.grad_weight) + at;
          if (io.accumulate) {
            const __m512i old = _mm512_maskz_loadu_epi16(mask, out);
            low = _mm512_add_ps(low, unpack_low(old));
            high = _mm512_add_ps(high, unpack_high(old));
          }
          const __m512i rounded = pack_bf16(low, high);
          _mm512_mask_storeu_epi16(out, mask, rounded);
        }
      }
    }
  };

  // A task writes whole rows of dW: two threads on halves of a row would each fault in, and clear, the same fresh pages.
  const int64_t part = kBlock / 32 >= 2 * h.threads ? d : std::min(d, round_up((d + 1) / 2, 32)), parts = (d + part - 1) / part;
  for (int64_t start = 0; start < h.v; start += kBlock) {
    const int64_t count = std::min(kBlock, h.v - start), row_groups = (count + 31) / 32, next = start + kBlock;
    const int64_t next_groups = needs_hidden && next < h.v ? (std::min(kBlock, h.v - next) + 31) / 32 : 0;
    run_tasks(panels, h.threads, [&](int64_t p, int64_t worker) { panel_block(p, start, worker); });
    if (io.grad_bias != nullptr)
      for (int64_t r = 0; r < count; ++r) {
        float total = 0;
        for (int64_t p = 0; p < panels; ++p) total += bias_sums.get()[p * kBlock + r];
        io.grad_bias[start + r] = total;
      }
    const int64_t weight_tasks = needs_weight ? row_groups * parts : 0;
    run_tasks(weight_tasks + next_groups, h.threads, [&](int64_t t, int64_t worker) {
      if (t >= weight_tasks) return transpose(next, t - weight_tasks);
      weight_rows(start, t / parts * 32, t % parts * part, std::min(d, (t % parts + 1) * part), worker);
    });
  }
  if (needs_hidden)
    run_tasks(panels, h.threads, [&](int64_t p, int64_t worker) {
      const float* from = sums + p * d * kLanes;
      if (in_place) {
        float* swap = panel_swap.get() + worker * d * kLanes;
        std::copy(from, from + d * kLanes, swap);
        from = swap;
      }
      call.untranspose(from, p, nullptr, io.grad_hidden);
    });
}

#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

}  // namespace llmcore::linear_logprob
