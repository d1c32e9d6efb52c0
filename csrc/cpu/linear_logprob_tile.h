// Tile kernels of the fused linear log-probability, included once per instruction set by linear_logprob_isa.h.
//
// The includer defines TILE_NAMESPACE, the accumulation type `real`, kMR x kNR (rows x columns of the register tile) and struct Vec:
// kWidth lanes of `real` with load, store, set1, fma, add, mul, max, exp, tanh and reductions in a fixed order. Everything here is free of tensors and,
// except for `convert_row`, of the operands' storage types.
//
// Every element of a product is one chain of fused multiply-adds per chunk of K, the chunks added in order: it does not depend on which other
// rows share the register tile, so a row's logits are the same bits in any batch.

namespace TILE_NAMESPACE {

// A panel matrix X holds rows x columns as [ceil(columns / kNR)][rows][kNR], panels `stride` elements apart. A product reads it as A = X
// (kRowsOfX: k runs along a panel's lines, then to the next panel) or as A = Xᵀ (k runs down a panel); both walk memory that lies together.
enum class Read { kRowsOfX, kColumnsOfX };

constexpr int64_t kLine = 64 / sizeof(real);                                            // elements of a cache line
constexpr int64_t kAheadTiles = 16;                                                     // register tiles over which the next panel's fetch is spread
constexpr int64_t kAhead = std::max<int64_t>(1, kNR * kNR / kLine / kAheadTiles);  // lines fetched for each kNR steps of k

// C (mr x kNR) = or += A (mr x kc) · B (kc x kNR, one panel). In kColumnsOfX the mr rows of A lie in one panel.
// ahead: the part of the next panel of B to fetch meanwhile. C, which is read last, is asked for first.
template <int mr, Read how>
inline void micro(int64_t kc, const real* a, int64_t stride, const real* b, real* c, int64_t ldc, bool accumulate, const real* ahead) {
  constexpr int kVecs = kNR / Vec::kWidth;
  if (accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i)
      for (int j = 0; j < kNR; j += kLine) __builtin_prefetch(c + i * ldc + j, 1);
  }
  Vec acc[mr][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec::set1(0);
  constexpr bool kRowsOfX = how == Read::kRowsOfX;
  for (int64_t k0 = 0; k0 < kc; k0 += kNR) {
    const int64_t width = kc - k0 < kNR ? kc - k0 : kNR;
    for (int64_t line = 0; line < kAhead; ++line, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
    for (int64_t k = 0; k < width; ++k) {
      Vec bv[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) bv[j] = Vec::load(b + k * kNR + j * Vec::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < mr; ++i) {
        const Vec av = Vec::set1(kRowsOfX ? a[i * kNR + k] : a[k * kNR + i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec::fma(av, bv[j], acc[i][j]);
      }
    }
    a += kRowsOfX ? stride : kNR * kNR;
    b += kNR * kNR;
  }
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      real* at = c + i * ldc + j * Vec::kWidth;
      (accumulate ? Vec::add(Vec::load(at), acc[i][j]) : acc[i][j]).store(at);
    }
}

template <Read how, int mr = kMR>
inline void micro_edge(int rows, int64_t kc, const real* a, int64_t stride, const real* b, real* c, int64_t ldc, bool accumulate, const real* ahead) {
  if (rows == mr) return micro<mr, how>(kc, a, stride, b, c, ldc, accumulate, ahead);
  if constexpr (mr > 1) micro_edge<how, mr - 1>(rows, kc, a, stride, b, c, ldc, accumulate, ahead);
}

// C (m x n) = or += A (m x k) · B. A is a panel matrix read as `how` says, B one of k rows with panels `b_stride` apart; C is rows of `ldc`
// with panels `c_stride` apart: a panel matrix (ldc = kNR, written up to the last panel's end) or rows in memory (c_stride = kNR).
template <Read how>
void gemm(int64_t m, int64_t n, int64_t k, const real* a, int64_t a_stride, const real* b, int64_t b_stride, real* c, int64_t ldc, int64_t c_stride,
          bool accumulate) {
  // B's chunk of one panel and the lines of A that a register tile touches stay in the first-level cache together.
  constexpr int64_t kChunk = 256;
  static_assert(kChunk % kNR == 0);
  const bool padded = ldc == kNR;
  alignas(64) real edge[kMR * kNR];
  for (int64_t k0 = 0; k0 < k; k0 += kChunk) {
    const int64_t kc = k - k0 < kChunk ? k - k0 : kChunk;
    const bool add = accumulate || k0 > 0;
    for (int64_t j = 0; j < n; j += kNR) {
      const real* panel = b + (j / kNR) * b_stride + k0 * kNR;
      const int64_t columns = n - j < kNR ? n - j : kNR;
      const real* ahead = j + kNR < n ? panel + b_stride : b + (k0 + kChunk < k ? (k0 + kChunk) * kNR : 0);
      const real* const last = ahead + (kAheadTiles - 1) * kAhead * kLine * (kChunk / kNR);
      for (int64_t i = 0, rows; i < m; i += rows, ahead = std::min(ahead + kAhead * kLine * (kChunk / kNR), last)) {
        rows = m - i < kMR ? m - i : kMR;
        if (how == Read::kColumnsOfX && rows > kNR - i % kNR) rows = kNR - i % kNR;
        const real* from = how == Read::kRowsOfX ? a + (k0 / kNR) * a_stride + i * kNR : a + (i / kNR) * a_stride + k0 * kNR + i % kNR;
        real* to = c + (j / kNR) * c_stride + i * ldc;
        if (columns == kNR || padded) {
          micro_edge<how>(static_cast<int>(rows), kc, from, a_stride, panel, to, ldc, add, ahead);
        } else {
          micro_edge<how>(static_cast<int>(rows), kc, from, a_stride, panel, edge, kNR, false, ahead);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t q = 0; q < columns; ++q) to[r * ldc + q] = (add ? to[r * ldc + q] : real(0)) + edge[r * kNR + q];
        }
      }
    }
  }
  if (k == 0 && !accumulate)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[(j / kNR) * c_stride + i * ldc + j % kNR] = 0;
}

// One row of an operand in the accumulation type.
inline void convert_row(const void* source, Storage storage, int64_t n, real* out) {
  switch (storage) {
    case Storage::kReal: {
      const real* from = static_cast<const real*>(source);
      for (int64_t i = 0; i < n; ++i) out[i] = from[i];
      return;
    }
    case Storage::kBFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(source);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<real>(std::bit_cast<float>(static_cast<uint32_t>(from[i]) << 16));
      return;
    }
    case Storage::kHalf: {
      const uint16_t* from = static_cast<const uint16_t*>(source);
      int64_t i = 0;
#if defined(TILE_HALF8)
      for (; i + 8 <= n; i += 8) TILE_HALF8(from + i, out + i);
#endif
      for (; i < n; ++i) out[i] = static_cast<real>(half_to_float(from[i]));
      return;
    }
  }
}

// Rows [0, kNR) of a panel matrix transposed: out[k][kNR], element (k, j) = column k of row j.
inline void transpose_panel(const real* rows, int64_t stride, int64_t hidden_size, real* out) {
  for (int64_t k0 = 0; k0 < hidden_size; k0 += kNR, rows += stride, out += kNR * kNR) {
    const int64_t width = hidden_size - k0 < kNR ? hidden_size - k0 : kNR;
    int64_t k = 0;
#if defined(TILE_TRANSPOSE8)
    for (; k + 8 <= width; k += 8)
      for (int64_t j = 0; j < kNR; j += 8) TILE_TRANSPOSE8(rows + j * kNR + k, kNR, out + k * kNR + j, kNR);
#endif
    for (; k < width; ++k)
      for (int64_t j = 0; j < kNR; ++j) out[k * kNR + j] = rows[j * kNR + k];
  }
}

// One row of a panel matrix, zeros past `width`; panels `stride` apart.
inline void pack_row(const real* row, int64_t width, real* out, int64_t stride) {
  int64_t j = 0;
  for (; j + kNR <= width; j += kNR, out += stride)
    for (int64_t q = 0; q < kNR; ++q) out[q] = row[j + q];
  if (j < width)
    for (int64_t q = 0; q < kNR; ++q) out[q] = j + q < width ? row[j + q] : real(0);
}

// The inverse, up to the last panel's end.
inline void unpack_row(const real* panels, int64_t stride, int64_t width, real* out) {
  for (int64_t j = 0; j < width; j += kNR, panels += stride)
    for (int64_t q = 0; q < kNR; ++q) out[j + q] = panels[q];
}

// z = cap(scale · (a + bias)) / temperature over one row of a tile; the row's buffer is a multiple of kNR wide.
inline void finish_logits(real* z, int64_t n, const real* bias, const Transform& t) {
  if (bias == nullptr && t.identity) return;
  const Vec scale = Vec::set1(real(t.logit_scale)), inverse_cap = Vec::set1(real(t.softcap ? 1 / t.softcap : 0)), cap = Vec::set1(real(t.softcap));
  const Vec inverse_temperature = Vec::set1(real(1 / t.temperature));
  for (int64_t j = 0; j < n; j += Vec::kWidth) {
    Vec x = Vec::load(z + j);
    if (bias != nullptr) x = Vec::add(x, Vec::load(bias + j));
    x = Vec::mul(x, scale);
    if (t.softcap) x = Vec::mul(cap, Vec::tanh(Vec::mul(x, inverse_cap)));
    Vec::mul(x, inverse_temperature).store(z + j);
  }
}

// Statistics of one row of a tile, columns [0, n). Columns up to the vector width's multiple are overwritten with a value whose exponential is 0.
// resident_real / resident_half: where to keep the logits, or bfloat16 exp(z - max). direction: z is replaced by exp(z - max) · da/dz.
inline void row_statistics(real* z, int64_t n, int want, const Transform& t, real* resident_real, uint16_t* resident_half, bool direction, RowSums& out) {
  constexpr int64_t w = Vec::kWidth;
  const int64_t whole = (n + w - 1) / w * w;
  if (resident_real != nullptr)
    for (int64_t j = 0; j < n; ++j) resident_real[j] = z[j];
  for (int64_t j = n; j < whole; ++j) z[j] = std::numeric_limits<real>::lowest() / 4;
  Vec top = Vec::load(z);
  for (int64_t j = w; j < whole; j += w) top = Vec::max(top, Vec::load(z + j));
  const real m = top.reduce_max();
  out.max = m;
  if (want & kMean) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += z[j];
    out.sum_z = sum;
  }
  if (want & kArgmax) {
    out.argmax = 0;
    for (int64_t j = n - 1; j >= 0; --j)
      if (z[j] == m) out.argmax = j;
  }
  const Vec negative_max = Vec::set1(-m);
  Vec sum = Vec::set1(0), shifted = Vec::set1(0), squares = Vec::set1(0);
  alignas(64) real lanes[w];
  const real chain = real(t.logit_scale / t.temperature);
  for (int64_t j = 0; j < whole; j += w) {
    const Vec x = Vec::load(z + j), delta = Vec::add(x, negative_max), e = Vec::exp(delta);
    sum = Vec::add(sum, e);
    if (want & kEntropy) shifted = Vec::fma(e, delta, shifted);
    if (want & kSumSq) squares = Vec::fma(e, e, squares);
    if (resident_half != nullptr) {
      if (j + w <= n) {
        e.store_bfloat16(resident_half + j);
      } else {
        e.store(lanes);
        for (int64_t q = 0; j + q < n; ++q) resident_half[j + q] = to_bfloat16(static_cast<float>(lanes[q]));
      }
    }
    if (direction) {
      Vec factor = Vec::set1(chain);
      if (t.softcap) {
        const Vec ratio = Vec::mul(x, Vec::set1(real(t.temperature / t.softcap)));
        factor = Vec::mul(factor, Vec::fma(Vec::mul(ratio, Vec::set1(-1)), ratio, Vec::set1(1)));
      }
      Vec::mul(e, factor).store(z + j);
    }
  }
  out.sum = sum.reduce_add();
  out.shifted = shifted.reduce_add();
  out.sum_sq = squares.reduce_add();
}

// da of one row of a tile, into a panel matrix with zeros past n. z: final logits, or with resident_half none: the probabilities are then
// exp(offset - lse) times the stored ones.
inline void row_gradient(const real* z, int64_t n, const Transform& t, const uint16_t* resident_half, real offset, real lse, real prob_coef, real slope,
                         bool has_slope, real* panels, int64_t stride) {
  constexpr int64_t w = Vec::kWidth;
  const Vec negative_lse = Vec::set1(-lse), beta = Vec::set1(prob_coef), e = Vec::set1(slope), factor = Vec::set1(real(-t.logit_scale / t.temperature));
  const real rescale = resident_half != nullptr ? std::exp(offset - lse) : real(0);
  alignas(64) real lanes[w];
  int64_t j = 0;
  for (; j < n; j += w) {
    const bool whole = j + w <= n;
    Vec x, p;
    if (resident_half != nullptr) {
      if (whole) {
        x = Vec::load_bfloat16(resident_half + j);
      } else {
        for (int64_t q = 0; q < w; ++q) lanes[q] = j + q < n ? real(std::bit_cast<float>(uint32_t(resident_half[j + q]) << 16)) : real(0);
        x = Vec::load(lanes);
      }
      p = Vec::mul(x, Vec::set1(rescale));
      if (has_slope || t.softcap) {
        x.store(lanes);
        for (int64_t q = 0; q < w; ++q) lanes[q] = lanes[q] > 0 ? std::log(lanes[q]) + offset : lse;
        x = Vec::load(lanes);
      }
    } else {
      if (whole) {
        x = Vec::load(z + j);
      } else {
        for (int64_t q = 0; q < w; ++q) lanes[q] = j + q < n ? z[j + q] : real(0);
        x = Vec::load(lanes);
      }
      p = Vec::exp(Vec::add(x, negative_lse));
    }
    Vec inner = has_slope ? Vec::fma(e, x, beta) : beta;
    Vec da = Vec::mul(Vec::mul(p, inner), factor);
    if (t.softcap) {
      const Vec ratio = Vec::mul(x, Vec::set1(real(t.temperature / t.softcap)));
      da = Vec::mul(da, Vec::fma(Vec::mul(ratio, Vec::set1(-1)), ratio, Vec::set1(1)));
    }
    real* const out = panels + j / kNR * stride + j % kNR;
    if (whole) {
      da.store(out);
    } else {
      da.store(lanes);
      for (int64_t q = 0; q < w; ++q) out[q] = j + q < n ? lanes[q] : real(0);
    }
  }
  for (; j % kNR != 0; ++j) panels[j / kNR * stride + j % kNR] = 0;
}

// One row of a gradient, rounded once into a 16-bit parameter's dtype, or added to what is there.
inline void store_half_row(const real* row, int64_t n, uint16_t* out, Storage storage, bool add) {
  int64_t j = 0;
#if defined(TILE_STORE_HALF8)
  for (; storage == Storage::kHalf && !add && j + 8 <= n; j += 8) TILE_STORE_HALF8(row + j, out + j);
#endif
  for (; storage == Storage::kBFloat16 && j + Vec::kWidth <= n; j += Vec::kWidth) {
    const Vec value = Vec::load(row + j);
    (add ? Vec::add(Vec::load_bfloat16(out + j), value) : value).store_bfloat16(out + j);
  }
  for (; j < n; ++j) {
    const bool brain = storage == Storage::kBFloat16;
    const float old = !add ? 0.0f : brain ? std::bit_cast<float>(uint32_t(out[j]) << 16) : half_to_float(out[j]);
    const float value = old + static_cast<float>(row[j]);
    out[j] = brain ? to_bfloat16(value) : float_to_half(value);
  }
}

inline void scale_row(real* row, int64_t n, real factor) {
  for (int64_t j = 0; j < n; ++j) row[j] *= factor;
}

// Sums over the rows of a panel matrix, added to out: the bias gradient.
inline void add_column_sums(const real* panels, int64_t stride, int64_t rows, int64_t n, real* out) {
  for (int64_t j = 0; j < n; j += kNR, panels += stride) {
    const int64_t columns = n - j < kNR ? n - j : kNR;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t q = 0; q < columns; ++q) out[j + q] += panels[r * kNR + q];
  }
}

inline constexpr Tile<real> kTile{kNR,           gemm<Read::kRowsOfX>, gemm<Read::kColumnsOfX>, convert_row,    transpose_panel, pack_row,
                                  unpack_row,    finish_logits,        row_statistics,          row_gradient,   store_half_row,  scale_row,
                                  add_column_sums};

}  // namespace TILE_NAMESPACE
