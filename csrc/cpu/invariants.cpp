// Invariant products M = P Qᵀ on the CPU, and sums over pairs of them that never store an M.
//
// invariants_tile_sums   A = a_left a_rightᵀ (m, n), B = b_left b_rightᵀ (m, n): ΣA, ΣB, ΣA², ΣB², ΣAB, tile by tile. With the factors
//                        themselves this is the streaming algorithm; with transposed views of them, (R, K), it is the factor algorithm,
//                        <M_A, M_B> = Σ (P_Aᵀ P_B) ⊙ (Q_Aᵀ Q_B); `symmetric` then visits only tiles on and above the diagonal.
// invariants_product     (P Qᵀ - mean) · scale, written once.
// invariants_pair_sums   the five sums of two stored matrices (the direct algorithm).
// invariants_permuted_dots   Σ A ⊙ B[order][:, order] for many orders of the tokens, no permuted copy.
// invariants_count_sketch, invariants_sketch_scores   hashed rows; scores of an index of half-precision sketches against one query.
//
// GEMM: right factors are packed once into panels of NR columns, a block of TM left rows per task into panels of MR rows, depth in chunks of
// KC; both accumulators of a TM x TN tile stay in the L2 cache. Products accumulate in the operands' type, sums over entries in float64.
// Every tile writes its own five partial sums, added in tile order at the end: results do not depend on the number of threads.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "common/cpu_features.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kDepth = 256;   // KC: one panel of NR x KC floats is 16 KB, half of an L1 cache
constexpr int64_t kRows = 96;     // TM at most: a multiple of every MR below, as every smaller one is
constexpr int64_t kColumns = 256; // TN: a multiple of every NR below
constexpr int64_t kStripe = 1024; // columns of one task, so that few rows still feed many cores
constexpr int kLanes = 8;         // independent float64 accumulators of a row sum

// c (MR x NR, row stride ldc) += a panel (depth x MR) times b panel (depth x NR).
template <typename T>
using Micro = void (*)(const T* a, const T* b, int64_t depth, T* c, int64_t ldc);
// sums[0..4] += weight · (Σa, Σb, Σa², Σb², Σab) over count entries.
template <typename T>
using RowSums = void (*)(const T* a, const T* b, int64_t count, double weight, double* sums);

#define LLMCORE_MICRO(NAME, TARGET, T, V, MR, NV, W, LOAD, STORE, SET1, FMA)                             \
  TARGET void NAME(const T* a, const T* b, int64_t depth, T* c, int64_t ldc) {                           \
    V acc[MR][NV];                                                                                       \
    _Pragma("GCC unroll 16") for (int i = 0; i < MR; ++i)                                                \
        _Pragma("GCC unroll 4") for (int j = 0; j < NV; ++j) acc[i][j] = LOAD(c + i * ldc + j * W);      \
    for (int64_t p = 0; p < depth; ++p, a += MR, b += NV * W) {                                          \
      V columns[NV];                                                                                     \
      _Pragma("GCC unroll 4") for (int j = 0; j < NV; ++j) columns[j] = LOAD(b + j * W);                 \
      _Pragma("GCC unroll 16") for (int i = 0; i < MR; ++i) {                                            \
        const V row = SET1(a[i]);                                                                        \
        _Pragma("GCC unroll 4") for (int j = 0; j < NV; ++j) acc[i][j] = FMA(row, columns[j], acc[i][j]); \
      }                                                                                                  \
    }                                                                                                    \
    _Pragma("GCC unroll 16") for (int i = 0; i < MR; ++i)                                                \
        _Pragma("GCC unroll 4") for (int j = 0; j < NV; ++j) STORE(c + i * ldc + j * W, acc[i][j]);      \
  }

#define LLMCORE_SUMS(NAME, TARGET, T)                                                                    \
  TARGET void NAME(const T* a, const T* b, int64_t count, double weight, double* sums) {                 \
    double lanes[5][kLanes] = {};                                                                        \
    int64_t i = 0;                                                                                       \
    for (; i + kLanes <= count; i += kLanes) {                                                           \
      _Pragma("GCC unroll 8") for (int l = 0; l < kLanes; ++l) {                                         \
        const double x = a[i + l], y = b[i + l];                                                         \
        lanes[0][l] += x, lanes[1][l] += y;                                                              \
        lanes[2][l] += x * x, lanes[3][l] += y * y, lanes[4][l] += x * y;                                \
      }                                                                                                  \
    }                                                                                                    \
    for (int l = 0; i < count; ++i, ++l) {                                                               \
      const double x = a[i], y = b[i];                                                                   \
      lanes[0][l] += x, lanes[1][l] += y;                                                                \
      lanes[2][l] += x * x, lanes[3][l] += y * y, lanes[4][l] += x * y;                                  \
    }                                                                                                    \
    for (int s = 0; s < 5; ++s) {                                                                        \
      double total = 0;                                                                                  \
      for (int l = 0; l < kLanes; ++l) total += lanes[s][l];                                             \
      sums[s] += weight * total;                                                                         \
    }                                                                                                    \
  }

template <typename T>
void micro_baseline(const T* a, const T* b, int64_t depth, T* c, int64_t ldc) {
  T acc[4][8];
  for (int i = 0; i < 4; ++i) for (int j = 0; j < 8; ++j) acc[i][j] = c[i * ldc + j];
  for (int64_t p = 0; p < depth; ++p, a += 4, b += 8)
    for (int i = 0; i < 4; ++i) for (int j = 0; j < 8; ++j) acc[i][j] += a[i] * b[j];
  for (int i = 0; i < 4; ++i) for (int j = 0; j < 8; ++j) c[i * ldc + j] = acc[i][j];
}
LLMCORE_SUMS(sums_baseline_f32, , float)
LLMCORE_SUMS(sums_baseline_f64, , double)

#if defined(__x86_64__)
#define LLMCORE_AVX2 __attribute__((target("avx2,fma")))
#define LLMCORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
LLMCORE_MICRO(micro_avx2_f32, LLMCORE_AVX2, float, __m256, 6, 2, 8, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps)
LLMCORE_MICRO(micro_avx2_f64, LLMCORE_AVX2, double, __m256d, 6, 2, 4, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_set1_pd, _mm256_fmadd_pd)
LLMCORE_SUMS(sums_avx2_f32, LLMCORE_AVX2, float)
LLMCORE_SUMS(sums_avx2_f64, LLMCORE_AVX2, double)
LLMCORE_MICRO(micro_avx512_f32, LLMCORE_AVX512, float, __m512, 12, 2, 16, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps)
LLMCORE_MICRO(micro_avx512_f64, LLMCORE_AVX512, double, __m512d, 12, 2, 8, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_set1_pd, _mm512_fmadd_pd)
LLMCORE_SUMS(sums_avx512_f32, LLMCORE_AVX512, float)
LLMCORE_SUMS(sums_avx512_f64, LLMCORE_AVX512, double)
#endif

template <typename T>
struct Core {
  int64_t mr, nr;
  Micro<T> micro;
  RowSums<T> sums;
};

template <typename T>
Core<T> core();
template <>
Core<float> core<float>() {
#if defined(__x86_64__)
  if (llmcore::cpu_level() >= llmcore::CpuLevel::kAvx512) return {12, 32, micro_avx512_f32, sums_avx512_f32};
  if (llmcore::cpu_level() >= llmcore::CpuLevel::kAvx2) return {6, 16, micro_avx2_f32, sums_avx2_f32};
#endif
  return {4, 8, micro_baseline<float>, sums_baseline_f32};
}
template <>
Core<double> core<double>() {
#if defined(__x86_64__)
  if (llmcore::cpu_level() >= llmcore::CpuLevel::kAvx512) return {12, 16, micro_avx512_f64, sums_avx512_f64};
  if (llmcore::cpu_level() >= llmcore::CpuLevel::kAvx2) return {6, 8, micro_avx2_f64, sums_avx2_f64};
#endif
  return {4, 8, micro_baseline<double>, sums_baseline_f64};
}

// A factor, (rows, depth) with any strides: a transposed view costs nothing.
template <typename T>
struct Factor {
  const T* data;
  int64_t rows, depth, row_stride, depth_stride;
};

template <typename T>
Factor<T> factor(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

int64_t panels(int64_t rows, int64_t width) { return (rows + width - 1) / width; }

template <int kWidth, typename T>
void copy_lines(const T* source, int64_t stride, int64_t count, T* out) {
  for (int64_t p = 0; p < count; ++p) std::memcpy(out + p * kWidth, source + p * stride, sizeof(T) * kWidth);
}

// Depths [p0, p1) of a panel: rows [first, first + width) as (depth, width). Rows beyond the end are zero: edges need no other kernel.
template <typename T>
void pack_panel(const Factor<T>& f, int64_t first, int64_t width, int64_t p0, int64_t p1, T* out) {
  const int64_t valid = std::clamp<int64_t>(f.rows - first, 0, width);
  const T* source = f.data + first * f.row_stride;
  if (f.row_stride == 1 && valid == width) {
    T* target = out + p0 * width;
    source += p0 * f.depth_stride;
    switch (width) {  // of the cores below: moves of a known size
      case 4: return copy_lines<4>(source, f.depth_stride, p1 - p0, target);
      case 6: return copy_lines<6>(source, f.depth_stride, p1 - p0, target);
      case 8: return copy_lines<8>(source, f.depth_stride, p1 - p0, target);
      case 12: return copy_lines<12>(source, f.depth_stride, p1 - p0, target);
      case 16: return copy_lines<16>(source, f.depth_stride, p1 - p0, target);
      case 32: return copy_lines<32>(source, f.depth_stride, p1 - p0, target);
    }
  }
  for (int64_t i = 0; i < valid; ++i, source += f.row_stride)
    for (int64_t p = p0; p < p1; ++p) out[p * width + i] = source[p * f.depth_stride];
  for (int64_t i = valid; i < width; ++i)
    for (int64_t p = p0; p < p1; ++p) out[p * width + i] = T(0);
}

constexpr int64_t kPacked = 64;  // depths packed at a time: what a panel's part reads and writes stays in cache

// Panels of rows [row0, row0 + rows), one after the other, each over the whole depth; a transposed view is read line by line.
template <typename T>
void pack_rows(const Factor<T>& f, int64_t row0, int64_t rows, int64_t width, int64_t p0, int64_t p1, T* out) {
  for (; p0 < p1; p0 += kPacked)
    for (int64_t i = 0; i < rows; i += width) pack_panel(f, row0 + i, width, p0, std::min(p1, p0 + kPacked), out + i * f.depth);
}

// Memory that is written before it is read.
template <typename T>
using Scratch = std::unique_ptr<T[]>;
template <typename T>
Scratch<T> scratch(int64_t count) { return Scratch<T>(new T[count]); }

template <typename T>
Scratch<T> pack_all(const Factor<T>& f, int64_t width) {
  Scratch<T> packed = scratch<T>(panels(f.rows, width) * width * f.depth);
  if (f.row_stride == 1) {
    torch::stable::parallel_for(0, panels(f.depth, kPacked), 1, [&](int64_t begin, int64_t end) {
      pack_rows(f, 0, f.rows, width, begin * kPacked, std::min(f.depth, end * kPacked), packed.get());
    });
  } else {
    torch::stable::parallel_for(0, panels(f.rows, width), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_rows(f, i * width, width, width, 0, f.depth, packed.get() + i * width * f.depth);
    });
  }
  return packed;
}

// TM of a product of m rows: eight tasks or more where there are eight panels of rows, whatever the number of threads. Deep products of
// few rows (the Gram matrices of thin factors) have no other parallelism, and half of a small symmetric product is saved only by tiles
// that are smaller still.
int64_t tile_rows(int64_t m) {
  constexpr int64_t kEvery = 12;  // a multiple of every MR
  return std::min(kRows, panels(m, 8 * kEvery) * kEvery);
}

// tile (kRows, kColumns) = left block times right panels [column0 / nr ...).
template <typename T>
void multiply_tile(const Core<T>& k, const T* left, const T* right, int64_t depth, int64_t rows, int64_t column0, int64_t columns, T* tile) {
  std::fill(tile, tile + panels(rows, k.mr) * k.mr * kColumns, T(0));
  for (int64_t p = 0; p < depth; p += kDepth) {
    const int64_t chunk = std::min(kDepth, depth - p);
    for (int64_t j = 0; j < columns; j += k.nr) {
      const T* b = right + (column0 + j) * depth + p * k.nr;
      for (int64_t i = 0; i < rows; i += k.mr) k.micro(left + i * depth + p * k.mr, b, chunk, tile + i * kColumns + j, kColumns);
    }
  }
}

template <typename T>
void tile_sums(const Tensor& al, const Tensor& ar, const Tensor& bl, const Tensor& br, bool symmetric, double* result) {
  const Core<T> k = core<T>();
  const auto a_left = factor<T>(al), a_right = factor<T>(ar), b_left = factor<T>(bl), b_right = factor<T>(br);
  const int64_t m = a_left.rows, n = a_right.rows;
  if (m == 0 || n == 0) return;
  const Scratch<T> a_packed = pack_all(a_right, k.nr), b_packed = pack_all(b_right, k.nr);
  const int64_t tall = tile_rows(m), row_tiles = panels(m, tall), stripes = panels(n, kStripe);
  std::vector<double> partial(row_tiles * stripes * 5, 0.0);
  torch::stable::parallel_for(0, row_tiles * stripes, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> a_block = scratch<T>(tall * a_left.depth), b_block = scratch<T>(tall * b_left.depth);
    const Scratch<T> a_tile = scratch<T>(kRows * kColumns), b_tile = scratch<T>(kRows * kColumns);
    for (int64_t task = begin; task < end; ++task) {
      // Row tiles from both ends in turn: of a symmetric product the first has all columns and the last one tile of them, and every
      // range of tasks should have its share.
      const int64_t turn = task / stripes, row_tile = turn % 2 ? row_tiles - 1 - turn / 2 : turn / 2;
      const int64_t row0 = row_tile * tall, rows = std::min(tall, m - row0);
      const int64_t stripe = (task % stripes) * kStripe, last = std::min(n, stripe + kStripe);
      const int64_t first = symmetric ? std::max(stripe, row0 / k.nr * k.nr) : stripe;
      if (first >= last) continue;
      pack_rows(a_left, row0, rows, k.mr, 0, a_left.depth, a_block.get());
      pack_rows(b_left, row0, rows, k.mr, 0, b_left.depth, b_block.get());
      double* sums = partial.data() + task * 5;
      for (int64_t column0 = first; column0 < last; column0 += kColumns) {
        const int64_t columns = std::min(kColumns, last - column0);
        multiply_tile(k, a_block.get(), a_packed.get(), a_left.depth, rows, column0, columns, a_tile.get());
        multiply_tile(k, b_block.get(), b_packed.get(), b_left.depth, rows, column0, columns, b_tile.get());
        for (int64_t i = 0; i < rows; ++i) {
          const T *a = a_tile.get() + i * kColumns, *b = b_tile.get() + i * kColumns;
          if (!symmetric) {
            k.sums(a, b, columns, 1.0, sums);
            continue;
          }
          // Entries above the diagonal stand for their mirror images too.
          const int64_t diagonal = row0 + i - column0;
          if (diagonal >= 0 && diagonal < columns) k.sums(a + diagonal, b + diagonal, 1, 1.0, sums);
          const int64_t above = std::clamp<int64_t>(diagonal + 1, 0, columns);
          k.sums(a + above, b + above, columns - above, 2.0, sums);
        }
      }
    }
  });
  for (size_t task = 0; task < partial.size() / 5; ++task)
    for (int s = 0; s < 5; ++s) result[s] += partial[task * 5 + s];
}

template <typename T>
void product(const Tensor& left, const Tensor& right, T mean, T scale, T* out) {
  const Core<T> k = core<T>();
  const auto l = factor<T>(left), r = factor<T>(right);
  const int64_t m = l.rows, n = r.rows;
  if (m == 0 || n == 0) return;
  const Scratch<T> packed = pack_all(r, k.nr);
  const int64_t tall = tile_rows(m), stripes = panels(n, kStripe);
  torch::stable::parallel_for(0, panels(m, tall) * stripes, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> block = scratch<T>(tall * l.depth), tile = scratch<T>(kRows * kColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row0 = (task / stripes) * tall, rows = std::min(tall, m - row0);
      const int64_t first = (task % stripes) * kStripe, last = std::min(n, first + kStripe);
      pack_rows(l, row0, rows, k.mr, 0, l.depth, block.get());
      for (int64_t column0 = first; column0 < last; column0 += kColumns) {
        const int64_t columns = std::min(kColumns, last - column0);
        multiply_tile(k, block.get(), packed.get(), l.depth, rows, column0, columns, tile.get());
        for (int64_t i = 0; i < rows; ++i) {
          T* target = out + (row0 + i) * n + column0;
          const T* source = tile.get() + i * kColumns;
          for (int64_t j = 0; j < columns; ++j) target[j] = (source[j] - mean) * scale;
        }
      }
    }
  });
}

void check_factor(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, "invariants: ", name, " must have 2 dimensions");
  STD_TORCH_CHECK(t.is_cpu(), "invariants: ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type && (type == ScalarType::Float || type == ScalarType::Double),
                  "invariants: ", name, " must be float32 or float64, all factors alike");
}

Tensor invariants_tile_sums(const Tensor& a_left, const Tensor& a_right, const Tensor& b_left, const Tensor& b_right, bool symmetric) {
  const ScalarType type = a_left.scalar_type();
  check_factor(a_left, type, "a_left"), check_factor(a_right, type, "a_right");
  check_factor(b_left, type, "b_left"), check_factor(b_right, type, "b_right");
  STD_TORCH_CHECK(a_left.size(0) == b_left.size(0) && a_right.size(0) == b_right.size(0), "invariants: both products must have one shape");
  STD_TORCH_CHECK(a_left.size(1) == a_right.size(1) && b_left.size(1) == b_right.size(1), "invariants: left and right must have one depth");
  STD_TORCH_CHECK(!symmetric || a_left.size(0) == a_right.size(0), "invariants: symmetric products must be square");
  Tensor out = torch::stable::empty({5}, ScalarType::Double);
  double* sums = static_cast<double*>(out.mutable_data_ptr());
  std::fill(sums, sums + 5, 0.0);
  if (type == ScalarType::Float) tile_sums<float>(a_left, a_right, b_left, b_right, symmetric, sums);
  else tile_sums<double>(a_left, a_right, b_left, b_right, symmetric, sums);
  return out;
}

Tensor invariants_product(const Tensor& left, const Tensor& right, double mean, double scale) {
  const ScalarType type = left.scalar_type();
  check_factor(left, type, "left"), check_factor(right, type, "right");
  STD_TORCH_CHECK(left.size(1) == right.size(1), "invariants: left and right must have one depth");
  Tensor out = torch::stable::empty({left.size(0), right.size(0)}, type);
  if (type == ScalarType::Float)
    product<float>(left, right, static_cast<float>(mean), static_cast<float>(scale), static_cast<float*>(out.mutable_data_ptr()));
  else
    product<double>(left, right, mean, scale, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

template <typename T>
void pair_sums(const T* a, const T* b, int64_t count, double* result) {
  const Core<T> k = core<T>();
  constexpr int64_t kBlock = 1 << 15;  // fixed blocks: the order of addition does not depend on the number of threads
  const int64_t blocks = panels(count, kBlock);
  std::vector<double> partial(blocks * 5, 0.0);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      k.sums(a + i * kBlock, b + i * kBlock, std::min(kBlock, count - i * kBlock), 1.0, partial.data() + i * 5);
  });
  for (int64_t i = 0; i < blocks; ++i)
    for (int s = 0; s < 5; ++s) result[s] += partial[i * 5 + s];
}

Tensor invariants_pair_sums(const Tensor& a, const Tensor& b) {
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK(a.is_cpu() && b.is_cpu() && a.is_contiguous() && b.is_contiguous() && a.numel() == b.numel(),
                  "invariants: a and b must be contiguous CPU tensors of one size");
  STD_TORCH_CHECK(b.scalar_type() == type && (type == ScalarType::Float || type == ScalarType::Double),
                  "invariants: a and b must both be float32 or float64");
  Tensor out = torch::stable::empty({5}, ScalarType::Double);
  double* sums = static_cast<double*>(out.mutable_data_ptr());
  std::fill(sums, sums + 5, 0.0);
  if (type == ScalarType::Float)
    pair_sums(static_cast<const float*>(a.const_data_ptr()), static_cast<const float*>(b.const_data_ptr()), a.numel(), sums);
  else
    pair_sums(static_cast<const double*>(a.const_data_ptr()), static_cast<const double*>(b.const_data_ptr()), a.numel(), sums);
  return out;
}

// result[n] = Σ_ij a[i, j] b[order_n[i], order_n[j]], a and b (k, k).
template <typename T>
void permuted_dots(const T* a, const T* b, const int64_t* orders, int64_t k, int64_t count, double* result) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t* order = orders + n * k;
      double total = 0;
      for (int64_t i = 0; i < k; ++i) {
        const T *x = a + i * k, *y = b + order[i] * k;
        double lanes[4] = {};
        int64_t j = 0;
        for (; j + 4 <= k; j += 4)
          for (int l = 0; l < 4; ++l) lanes[l] += static_cast<double>(x[j + l]) * y[order[j + l]];
        for (; j < k; ++j) lanes[0] += static_cast<double>(x[j]) * y[order[j]];
        total += (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
      }
      result[n] = total;
    }
  });
}

Tensor invariants_permuted_dots(const Tensor& a, const Tensor& b, const Tensor& orders) {
  const ScalarType type = a.scalar_type();
  check_factor(a, type, "a"), check_factor(b, type, "b");
  const int64_t k = a.size(0);
  STD_TORCH_CHECK(a.size(1) == k && b.size(0) == k && b.size(1) == k && a.is_contiguous() && b.is_contiguous(),
                  "invariants: a and b must be contiguous square matrices of one size");
  STD_TORCH_CHECK(orders.dim() == 2 && orders.size(1) == k && orders.is_cpu() && orders.is_contiguous() &&
                  orders.scalar_type() == ScalarType::Long, "invariants: orders must be contiguous int64, one column a row of a");
  const int64_t* order = static_cast<const int64_t*>(orders.const_data_ptr());
  for (int64_t i = 0; i < orders.numel(); ++i) STD_TORCH_CHECK(order[i] >= 0 && order[i] < k, "invariants: orders must lie in [0, k)");
  Tensor out = torch::stable::empty({orders.size(0)}, ScalarType::Double);
  double* result = static_cast<double*>(out.mutable_data_ptr());
  if (type == ScalarType::Float)
    permuted_dots(static_cast<const float*>(a.const_data_ptr()), static_cast<const float*>(b.const_data_ptr()), order, k, orders.size(0), result);
  else
    permuted_dots(static_cast<const double*>(a.const_data_ptr()), static_cast<const double*>(b.const_data_ptr()), order, k, orders.size(0), result);
  return out;
}

// out[bins[k]] += signs[k] · rows[k], one task a range of columns: no two threads touch one number, and the order of addition is fixed.
template <typename T>
void count_sketch(const T* rows, const int64_t* bins, const T* signs, int64_t num_rows, int64_t depth, int64_t width, T* out) {
  std::fill(out, out + width * depth, T(0));
  torch::stable::parallel_for(0, depth, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < num_rows; ++k) {
      const T* source = rows + k * depth;
      T* target = out + bins[k] * depth;
      const T sign = signs[k];
      for (int64_t r = begin; r < end; ++r) target[r] += sign * source[r];
    }
  });
}

Tensor invariants_count_sketch(const Tensor& rows, const Tensor& bins, const Tensor& signs, int64_t width) {
  const ScalarType type = rows.scalar_type();
  check_factor(rows, type, "rows");
  STD_TORCH_CHECK(rows.is_contiguous() && bins.is_cpu() && signs.is_cpu() && bins.is_contiguous() && signs.is_contiguous(),
                  "invariants: rows, bins and signs must be contiguous CPU tensors");
  STD_TORCH_CHECK(bins.scalar_type() == ScalarType::Long && signs.scalar_type() == type && bins.numel() == rows.size(0) && signs.numel() == rows.size(0),
                  "invariants: bins must be int64 and signs of the rows' dtype, one a row");
  const int64_t* bin = static_cast<const int64_t*>(bins.const_data_ptr());
  for (int64_t k = 0; k < rows.size(0); ++k) STD_TORCH_CHECK(bin[k] >= 0 && bin[k] < width, "invariants: bins must lie in [0, width)");
  Tensor out = torch::stable::empty({width, rows.size(1)}, type);
  if (type == ScalarType::Float)
    count_sketch(static_cast<const float*>(rows.const_data_ptr()), bin, static_cast<const float*>(signs.const_data_ptr()), rows.size(0),
                 rows.size(1), width, static_cast<float*>(out.mutable_data_ptr()));
  else
    count_sketch(static_cast<const double*>(rows.const_data_ptr()), bin, static_cast<const double*>(signs.const_data_ptr()), rows.size(0),
                 rows.size(1), width, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

using Dot = float (*)(const c10::Half* a, const float* b, int64_t count);

float dot_baseline(const c10::Half* a, const float* b, int64_t count) {
  float lanes[8] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % 8] += static_cast<float>(a[i]) * b[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma,f16c"))) float dot_f16c(const c10::Half* a, const float* b, int64_t count) {
  __m256 acc[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (int l = 0; l < 4; ++l)
      acc[l] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i + 8 * l))),
                               _mm256_loadu_ps(b + i + 8 * l), acc[l]);
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])));
  float total = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  return i < count ? total + dot_baseline(a + i, b + i, count - i) : total;
}
#endif

// scores (N, channels) = per-channel dot products of half-precision sketches (N, channels · width) with one float32 query.
Tensor invariants_sketch_scores(const Tensor& sketches, const Tensor& query, int64_t channels) {
  STD_TORCH_CHECK(sketches.dim() == 2 && sketches.is_cpu() && query.is_cpu() && sketches.is_contiguous() && query.is_contiguous(),
                  "invariants: sketches (N, channels * width) and query must be contiguous CPU tensors");
  STD_TORCH_CHECK(sketches.scalar_type() == ScalarType::Half && query.scalar_type() == ScalarType::Float,
                  "invariants: sketches must be float16 and query float32");
  STD_TORCH_CHECK(channels > 0 && query.numel() == sketches.size(1) && query.numel() % channels == 0,
                  "invariants: query must have as many numbers as a row of sketches, a multiple of channels");
  const int64_t rows = sketches.size(0), size = sketches.size(1), width = size / channels;
  Tensor out = torch::stable::empty({rows, channels}, ScalarType::Float);
  Dot dot = dot_baseline;
#if defined(__x86_64__)
  if (llmcore::cpu_level() >= llmcore::CpuLevel::kAvx2 && __builtin_cpu_supports("f16c")) dot = dot_f16c;
#endif
  const c10::Half* data = static_cast<const c10::Half*>(sketches.const_data_ptr());
  const float* wanted = static_cast<const float*>(query.const_data_ptr());
  float* scores = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < channels; ++c) scores[i * channels + c] = dot(data + i * size + c * width, wanted + c * width, width);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("invariants_tile_sums", TORCH_BOX(&invariants_tile_sums));
  m.impl("invariants_product", TORCH_BOX(&invariants_product));
  m.impl("invariants_pair_sums", TORCH_BOX(&invariants_pair_sums));
  m.impl("invariants_permuted_dots", TORCH_BOX(&invariants_permuted_dots));
  m.impl("invariants_count_sketch", TORCH_BOX(&invariants_count_sketch));
  m.impl("invariants_sketch_scores", TORCH_BOX(&invariants_sketch_scores));
}
