// Fused linear log-probability on CPU: statistics of softmax(cap(s (H Wᵀ + b)) / τ) per row, and the gradients, without the logit matrix.
//
// Loop order: vocabulary blocks of 512 columns outside, waves of 512 rows inside, and in each wave three parallel phases between barriers:
//   1  Z (rows x 512)  = H Wᵀ          a tile of Z a task (Grid)
//   2  row by row: bias, scale, cap, temperature, online statistics / gradient of the logits, dZ in the place of Z
//   3  dH += dZ W, dW = dZᵀ H          a tile of dH or dW a task
// Every operand of a product is a panel matrix [columns / NR][rows][NR] (linear_logprob_tile.h): Z is one, H is packed into one once a call where
// that is small, the weight block into W (phase 3) and Wᵀ (phase 1) once a block. All register tiles then read memory that lies together.
// Every sum is formed in an order fixed by the shapes alone (vocabulary blocks in order, rows in order), by one thread, without atomics: results are the same bits
// for any number of threads, and a row's statistics for any batch around it. 16-bit operands are widened as they are packed (bfloat16 on a CPU with
// dot products of it goes to linear_logprob_bf16.cpp); products, logits and sums
// are float32 (float64 operands: float64), running sums over the vocabulary are float64. Scratch does not grow with the vocabulary.
//
// A hand-written register tile and not the vendor's GEMM per tile: the vendor's result for a row depends on how many rows share the call, and the
// tile is not slower (12 x 32 on AVX-512: 160-185 GFLOP/s a thread on panels, where the vendor's product of the same sizes gave 140-165; 6 x 16 on
// AVX2: 88-93 of the 99 that multiply-adds between registers reach).
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/linear_logprob_bf16.h"
#include "cpu/linear_logprob_common.h"
#include "cpu/linear_logprob_isa.h"

namespace llmcore::linear_logprob {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWave = 512;                     // rows of a wave
constexpr int64_t kHiddenPanelBytes = 8ll << 20;   // H stays packed for the whole call up to this size, what lies beside it included
constexpr int64_t kRowsInGradient = 4096;          // as in linear_logprob_cpp.py

// Tiles of a product's result, one task each: as many rows as a chunk of A has in half a second-level cache, whole register tiles of every
// instruction set, and fewer columns the more threads there are.
struct Grid {
  static constexpr int64_t kRows = 192;
  int64_t rows = 0, columns = 0, width = 128, groups = 0, tasks = 0;

  Grid(int64_t rows, int64_t columns, int64_t threads) : rows(rows), columns(columns) {
    const int64_t bands = (rows + kRows - 1) / kRows;
    while (width > 32 && bands * ((columns + width - 1) / width) < 8 * threads) width /= 2;
    groups = (columns + width - 1) / width;
    tasks = bands * groups;
  }
  struct Part {
    int64_t row, count, column, width;
  };
  Part part(int64_t task) const {
    const int64_t row = task / groups * kRows, column = task % groups * width;
    return {row, std::min(kRows, rows - row), column, std::min(width, columns - column)};
  }
};

struct Operand {  // rows of a matrix with unit last stride
  const char* data = nullptr;
  Storage storage = Storage::kReal;
  int64_t row_bytes = 0;

  Operand(const Tensor& t, ScalarType real) {
    data = static_cast<const char*>(t.data_ptr());
    const ScalarType type = t.scalar_type();
    storage = type == ScalarType::BFloat16 ? Storage::kBFloat16 : type == ScalarType::Half ? Storage::kHalf : Storage::kReal;
    STD_TORCH_CHECK(storage != Storage::kReal || type == real, "linear_logprob: an operand's dtype does not fit the accumulation dtype");
    row_bytes = t.stride(0) * (storage != Storage::kReal ? 2 : real == ScalarType::Double ? 8 : 4);
  }
};

struct Shapes {
  int64_t rows, hidden_size, vocab_size;
};

Shapes check(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels) {
  STD_TORCH_CHECK(hidden.is_cpu() && weight.is_cpu() && rows.is_cpu() && labels.is_cpu(), "linear_logprob: tensors must be on the CPU");
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1), "linear_logprob: hidden (R, D) and weight (V, D) must agree");
  STD_TORCH_CHECK(hidden.size(1) == 1 || (hidden.stride(1) == 1 && weight.stride(1) == 1), "linear_logprob: rows must be contiguous");
  STD_TORCH_CHECK(rows.dim() == 1 && labels.dim() == 1 && rows.size(0) == labels.size(0) && rows.is_contiguous() && labels.is_contiguous() &&
                      rows.scalar_type() == ScalarType::Long && labels.scalar_type() == ScalarType::Long,
                  "linear_logprob: rows and labels must be contiguous int64 of one length");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous()), "linear_logprob: bias must be (V,)");
  const int64_t* index = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < rows.size(0); ++i) STD_TORCH_CHECK(index[i] >= 0 && index[i] < hidden.size(0), "linear_logprob: row index out of range");
  return {rows.size(0), weight.size(1), weight.size(0)};
}

template <typename real>
constexpr ScalarType kType = sizeof(real) == 8 ? ScalarType::Double : ScalarType::Float;

template <typename real>
real* optional_data(const std::optional<Tensor>& t) {
  return t ? static_cast<real*>(t->data_ptr()) : nullptr;
}

// Logits kept from forward to backward. Those of the first rows lie where the weight's gradient will be (`store`, its (V, D) memory): a vocabulary
// block's part of it has room for D rows of the block's logits, and the backward reads a block's logits before it writes that block's gradient.
// The rows after them lie in `resident`.
template <typename real>
struct KeptLogits {
  real* store = nullptr;
  real* resident = nullptr;
  int64_t in_store = 0, d = 0, v = 0;

  KeptLogits(const std::optional<Tensor>& store_t, const std::optional<Tensor>& resident_t, const Shapes& shapes) : d(shapes.hidden_size), v(shapes.vocab_size) {
    if (store_t) {
      STD_TORCH_CHECK(store_t->is_contiguous() && store_t->scalar_type() == kType<real> && store_t->numel() == v * d,
                      "linear_logprob: store must be (V, D), contiguous, of the accumulation dtype");
      store = static_cast<real*>(store_t->data_ptr());
      in_store = std::min(d, kRowsInGradient);
    }
    if (resident_t) {
      STD_TORCH_CHECK(resident_t->is_contiguous() && resident_t->scalar_type() == kType<real> && resident_t->size(1) == v,
                      "linear_logprob: resident must be (rows, V), contiguous, of the accumulation dtype");
      resident = static_cast<real*>(resident_t->data_ptr());
    }
  }
  bool any() const { return store != nullptr || resident != nullptr; }
  real* row(int64_t slot, int64_t start, int64_t columns) const {
    return slot < in_store ? store + start * d + slot * columns : resident + (slot - in_store) * v + start;
  }
};

// Fresh pages of [data, data + bytes) are faulted in by one thread each: threads that share a page would each fault and clear one.
void touch_pages(char* data, int64_t bytes, int64_t threads) {
  constexpr int64_t kPage = 4096, kShare = 64 * kPage;
  run_tasks((bytes + kShare - 1) / kShare, threads, [&](int64_t t, int64_t) {
    for (int64_t at = t * kShare; at < std::min(bytes, (t + 1) * kShare); at += kPage) data[at] = 0;
  });
}

// What both directions share: operands as panel matrices, and the wave of logits.
template <typename real>
struct Waves {
  const Tile<real>& k = tile<real>();
  const Shapes shapes;
  const Operand hidden, weight;
  const int64_t* rows;
  const Transform transform;
  const int64_t threads;
  const int64_t padded_size;   // hidden columns, whole panels
  const bool keeps_hidden;     // H is packed for all rows at once
  const int64_t hidden_rows;   // rows that the packed H has room for
  const int64_t pad;           // spreads the lines that a register tile reads of A, kNR columns a panel, over all first-level cache sets
  const int64_t z_stride, hidden_stride, weight_stride;
  Buffer<real> transposed, weight_rows, panel_scratch, z, hidden_panels, row_buffer, bias;
  const std::optional<Tensor>& bias_tensor;
  int64_t start = 0, columns = 0;  // of the present vocabulary block

  // needs_transposed / needs_rows: whether the call reads the weight as Wᵀ (logits) and as W (products with the logits' gradient).
  // beside: bytes growing with the rows that the call holds beside the packed H.
  Waves(const Tensor& h, const Tensor& r, const Tensor& w, const std::optional<Tensor>& b, const Tensor& labels, double logit_scale, double softcap,
        double temperature, bool needs_transposed, bool needs_rows, int64_t beside = 0)
      : shapes(check(h, r, w, b, labels)), hidden(h, kType<real>), weight(w, kType<real>), rows(static_cast<const int64_t*>(r.data_ptr())),
        transform{logit_scale, softcap, temperature, logit_scale == 1 && softcap == 0 && temperature == 1},
        threads(std::max<int64_t>(1, torch::stable::get_num_threads())), padded_size((shapes.hidden_size + k.nr - 1) / k.nr * k.nr),
        keeps_hidden(shapes.rows * padded_size * int64_t(sizeof(real)) + beside <= kHiddenPanelBytes),
        hidden_rows(keeps_hidden ? shapes.rows : std::min(kWave, shapes.rows)), pad(4 * k.nr), z_stride(std::min(kWave, shapes.rows) * k.nr + pad),
        hidden_stride(hidden_rows * k.nr + pad), weight_stride(kBlock * k.nr + pad), transposed(needs_transposed ? kBlock * shapes.hidden_size : 0),
        weight_rows(needs_rows ? padded_size / k.nr * weight_stride : 0), panel_scratch(needs_rows ? 0 : threads * k.nr * padded_size), z(kBlock / k.nr * z_stride),
        hidden_panels(padded_size / k.nr * hidden_stride), row_buffer(threads * shapes.hidden_size), bias(b ? kBlock + k.nr : 0), bias_tensor(b) {
    if (keeps_hidden) pack_hidden(0, shapes.rows);
  }

  // One row of an operand into a panel matrix.
  void pack(const char* row, Storage storage, int64_t worker, real* out, int64_t stride) const {
    const real* from = reinterpret_cast<const real*>(row);
    if (storage != Storage::kReal) {
      real* converted = row_buffer.get() + worker * shapes.hidden_size;
      k.convert_row(row, storage, shapes.hidden_size, converted);
      from = converted;
    }
    k.pack_row(from, shapes.hidden_size, out, stride);
  }

  void pack_hidden(int64_t begin, int64_t end) {
    run_tasks((end - begin + 15) / 16, threads, [&](int64_t t, int64_t worker) {
      for (int64_t i = begin + t * 16; i < std::min(end, begin + (t + 1) * 16); ++i)
        pack(hidden.data + rows[i] * hidden.row_bytes, hidden.storage, worker, hidden_panels.get() + (i - begin) * k.nr, hidden_stride);
    });
  }

  // Rows [wave, end) of H as a panel matrix.
  const real* hidden_wave(int64_t wave) const { return hidden_panels.get() + (keeps_hidden ? wave * k.nr : 0); }

  void begin_wave(int64_t wave, int64_t end) {
    if (!keeps_hidden) pack_hidden(wave, end);
  }

  // Pack one vocabulary block's weight rows as the call reads them, and its bias.
  void begin_block(int64_t first, bool needs_logits) {
    start = first;
    columns = std::min(kBlock, shapes.vocab_size - first);
    if (bias_tensor) {
      const Storage storage = Operand(*bias_tensor, kType<real>).storage;
      const char* from = static_cast<const char*>(bias_tensor->data_ptr()) + first * (storage == Storage::kReal ? sizeof(real) : 2);
      k.convert_row(from, storage, columns, bias.get());
      std::fill(bias.get() + columns, bias.get() + kBlock + k.nr, real(0));
    }
    const bool keeps = weight_rows.get() != nullptr;
    if (!needs_logits && !keeps) return;
    run_tasks((columns + k.nr - 1) / k.nr, threads, [&](int64_t panel, int64_t worker) {
      const int64_t row = panel * k.nr, count = std::min(k.nr, columns - row);
      real* const block = keeps ? weight_rows.get() + row * k.nr : panel_scratch.get() + worker * k.nr * padded_size;
      const int64_t stride = keeps ? weight_stride : k.nr * k.nr;
      for (int64_t i = 0; i < count; ++i)
        pack(weight.data + (start + row + i) * weight.row_bytes, weight.storage, worker, block + i * k.nr, stride);
      if (!needs_logits) return;
      for (int64_t i = count; i < k.nr; ++i)
        for (int64_t p = 0; p < padded_size / k.nr; ++p) std::fill_n(block + p * stride + i * k.nr, k.nr, real(0));
      k.transpose_panel(block, stride, shapes.hidden_size, transposed.get() + row * shapes.hidden_size);
    });
  }

  // Phase 1: raw logits of rows [begin, end) into the wave's panels.
  void project(int64_t wave, int64_t begin, int64_t end) {
    const Grid grid(end - begin, columns, threads);
    run_tasks(grid.tasks, threads, [&](int64_t t, int64_t) {
      const auto [row, count, column, width] = grid.part(t);
      const int64_t first = begin + row - wave;
      k.gemm_rows(count, width, shapes.hidden_size, hidden_wave(wave) + first * k.nr, hidden_stride, transposed.get() + column * shapes.hidden_size,
                  shapes.hidden_size * k.nr, z.get() + column / k.nr * z_stride + first * k.nr, k.nr, z_stride, false);
    });
  }

  // Phase 3, one task: a part of into (rows of ldc) = or += Z · W, and of Zᵀ · H.
  void times_weight(const Grid::Part& part, real* into) const {
    k.gemm_rows(part.count, part.width, columns, z.get() + part.row * k.nr, z_stride, weight_rows.get() + part.column / k.nr * weight_stride, weight_stride,
                into + part.row * shapes.hidden_size + part.column, shapes.hidden_size, k.nr, true);
  }
  void times_hidden(int64_t wave, int64_t rows_of_wave, const Grid::Part& part, real* into, bool accumulate) const {
    k.gemm_columns(part.count, part.width, rows_of_wave, z.get() + part.row / k.nr * z_stride, z_stride,
                   hidden_wave(wave) + part.column / k.nr * hidden_stride, hidden_stride, into + part.row * shapes.hidden_size + part.column,
                   shapes.hidden_size, k.nr, accumulate);
  }
};

int64_t row_tasks(int64_t rows) { return (rows + 15) / 16; }

template <typename real>
void forward(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, int64_t vocab_start,
             double logit_scale, double softcap, double temperature, int64_t want, const Tensor& stats, const Tensor& argmax,
             const std::optional<Tensor>& resident, const std::optional<Tensor>& offsets, const std::optional<Tensor>& direction,
             const std::optional<Tensor>& store, int64_t kept) {
  Waves<real> w(hidden, rows, weight, bias, labels, logit_scale, softcap, temperature, true, direction.has_value(),
                direction ? direction->numel() * int64_t(sizeof(real)) : 0);
  const auto [m, d, v] = w.shapes;
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Double && stats.is_contiguous() && stats.numel() == 6 * m, "linear_logprob: stats must be (6, M) float64");
  double* const row_max = static_cast<double*>(stats.data_ptr());
  double *sum = row_max + m, *target = row_max + 2 * m, *shifted = row_max + 3 * m, *sum_sq = row_max + 4 * m, *sum_z = row_max + 5 * m;
  std::fill(row_max, row_max + m, -std::numeric_limits<double>::infinity());
  std::fill(sum, sum + 5 * m, 0.0);
  const int64_t* label = static_cast<const int64_t*>(labels.data_ptr());
  int64_t* best = want & kArgmax ? static_cast<int64_t*>(argmax.data_ptr()) : nullptr;
  if (best != nullptr) std::fill(best, best + m, vocab_start);
  const int64_t tiles = (v + kBlock - 1) / kBlock;
  const KeptLogits<real> kept_real(store, offsets ? std::nullopt : resident, w.shapes);
  STD_TORCH_CHECK(kept <= kept_real.in_store + (resident ? resident->size(0) : 0), "linear_logprob: more rows to keep than places for them");
  uint16_t* kept_half = resident && offsets ? static_cast<uint16_t*>(resident->data_ptr()) : nullptr;
  float* offset = optional_data<float>(offsets);
  real* u = optional_data<real>(direction);
  if (u != nullptr) std::fill(u, u + m * d, real(0));

  for (int64_t start = 0; start < v; start += kBlock) {
    w.begin_block(start, true);
    for (int64_t wave = 0; wave < m; wave += kWave) {
      const int64_t end = std::min(m, wave + kWave);
      w.begin_wave(wave, end);
      w.project(wave, wave, end);
      run_tasks(row_tasks(end - wave), w.threads, [&](int64_t t, int64_t) {
        alignas(64) real z[kBlock];
        for (int64_t i = wave + t * 16; i < std::min(end, wave + (t + 1) * 16); ++i) {
          w.k.unpack_row(w.z.get() + (i - wave) * w.k.nr, w.z_stride, w.columns, z);
          w.k.finish_logits(z, w.columns, w.bias.get(), w.transform);
          const int64_t local = label[i] - vocab_start - start;
          if (local >= 0 && local < w.columns) target[i] = z[local];
          RowSums s;
          w.k.row_statistics(z, w.columns, static_cast<int>(want), w.transform, kept_real.any() && i < kept ? kept_real.row(i, start, w.columns) : nullptr,
                             kept_half && i < kept ? kept_half + i * v + start : nullptr, u != nullptr, s);
          if (kept_half && i < kept) offset[i * tiles + start / kBlock] = static_cast<float>(s.max);
          // Merge: while sum is 0 the old maximum is -inf and must not enter a difference.
          const double top = std::max(row_max[i], s.max);
          const double a = sum[i] > 0 ? std::exp(row_max[i] - top) : 0.0, b = std::exp(s.max - top);
          const double moved_a = a > 0 ? row_max[i] - top : 0.0, moved_b = s.max - top;
          if (want & kEntropy) shifted[i] = a * (shifted[i] + moved_a * sum[i]) + b * (s.shifted + (b > 0 ? moved_b * s.sum : 0.0));
          sum[i] = a * sum[i] + b * s.sum;
          sum_sq[i] = a * a * sum_sq[i] + b * b * s.sum_sq;
          sum_z[i] += s.sum_z;
          if (best != nullptr && s.max > row_max[i]) best[i] = vocab_start + start + s.argmax;
          row_max[i] = top;
          if (u != nullptr) {
            if (b != 1) w.k.scale_row(z, w.columns, static_cast<real>(b));
            w.k.pack_row(z, w.columns, w.z.get() + (i - wave) * w.k.nr, w.z_stride);
            if (start > 0 && a != 1) w.k.scale_row(u + i * d, d, static_cast<real>(a));
          }
        }
      });
      if (u == nullptr) continue;
      const Grid grid(end - wave, d, w.threads);
      run_tasks(grid.tasks, w.threads, [&](int64_t t, int64_t) { w.times_weight(grid.part(t), u + wave * d); });
    }
  }
}

// Add or copy one row of a gradient into a buffer of its own kind of dtype (float32 or float64), or round it into a 16-bit one.
template <typename real>
void store_row(const Tile<real>& k, const real* row, int64_t n, void* out, ScalarType type, bool add) {
  if (type == ScalarType::BFloat16 || type == ScalarType::Half)
    return k.store_half_row(row, n, static_cast<uint16_t*>(out), type == ScalarType::Half ? Storage::kHalf : Storage::kBFloat16, add);
  const auto into = [&](auto* at) {
    for (int64_t j = 0; j < n; ++j) at[j] = static_cast<std::remove_reference_t<decltype(*at)>>((add ? at[j] : 0) + row[j]);
  };
  type == ScalarType::Float ? into(static_cast<float*>(out)) : into(static_cast<double*>(out));
}

template <typename real>
void backward(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& labels, int64_t vocab_start,
              double logit_scale, double softcap, double temperature, const Tensor& lse_t, const Tensor& target_t, const Tensor& target_coef_t,
              const Tensor& prob_coef_t, const std::optional<Tensor>& slope_t, const std::optional<Tensor>& resident,
              const std::optional<Tensor>& offsets, const std::optional<Tensor>& slots_t, const std::optional<Tensor>& grad_hidden,
              const std::optional<Tensor>& grad_weight, bool accumulate_weight, const std::optional<Tensor>& grad_bias, const std::optional<Tensor>& store) {
  const int64_t* slots = optional_data<int64_t>(slots_t);
  int64_t stored = 0;  // stored rows come first
  if ((resident || store) && slots) while (stored < rows.size(0) && slots[stored] >= 0) ++stored;
  // Where logits are recomputed memory is to be small: the sums of a dH that the caller rounds to 16 bits count with the packed H.
  const bool recomputes = stored < rows.size(0), rounded = grad_hidden && hidden.scalar_type() != kType<real>;
  Waves<real> w(hidden, rows, weight, bias, labels, logit_scale, softcap, temperature, recomputes, grad_hidden.has_value(),
                recomputes && rounded ? grad_hidden->numel() * int64_t(sizeof(real)) : 0);
  const auto [m, d, v] = w.shapes;
  for (const Tensor* t : {&lse_t, &target_t, &target_coef_t, &prob_coef_t})
    STD_TORCH_CHECK(t->scalar_type() == kType<real> && t->is_contiguous() && t->numel() == m, "linear_logprob: row vectors must be (M,) of the accumulation dtype");
  const real *lse = static_cast<const real*>(lse_t.data_ptr()), *target = static_cast<const real*>(target_t.data_ptr());
  const real *target_coef = static_cast<const real*>(target_coef_t.data_ptr()), *prob_coef = static_cast<const real*>(prob_coef_t.data_ptr());
  const real* slope = optional_data<real>(slope_t);
  const int64_t* label = static_cast<const int64_t*>(labels.data_ptr());
  const KeptLogits<real> kept_real(store, offsets ? std::nullopt : resident, w.shapes);
  const uint16_t* kept_half = resident && offsets ? static_cast<const uint16_t*>(resident->data_ptr()) : nullptr;
  const float* offset = optional_data<float>(offsets);
  real* dh = optional_data<real>(grad_hidden);
  if (dh != nullptr) std::fill(dh, dh + m * d, real(0));
  real* db = optional_data<real>(grad_bias);
  if (db != nullptr) std::fill(db, db + v, real(0));
  const bool needs_weight = grad_weight.has_value();
  const ScalarType weight_type = needs_weight ? grad_weight->scalar_type() : kType<real>;
  // In the accumulation dtype the weight's gradient is summed in place, else in one block's buffer and rounded once.
  const bool in_place = needs_weight && weight_type == kType<real> && grad_weight->is_contiguous();
  const int64_t element = weight_type == ScalarType::Double ? 8 : weight_type == ScalarType::Float ? 4 : 2;
  // The first wave's product overwrites the block's kept logits: those of later waves are moved out before it.
  const bool overwrites = store && in_place && grad_weight->data_ptr() == store->data_ptr();
  STD_TORCH_CHECK(!overwrites || !accumulate_weight, "linear_logprob: a gradient that holds the logits cannot be accumulated into");
  int64_t in_store = 0;  // leading rows whose logits lie there, ascending slots
  while (in_store < stored && slots[in_store] < kept_real.in_store) ++in_store;
  const int64_t moved = overwrites ? std::max<int64_t>(0, in_store - kWave) : 0;
  Buffer<real> later(moved * kBlock);
  Buffer<real> dw_block(needs_weight && !in_place ? kBlock * d : 0);
  const int64_t tiles = (v + kBlock - 1) / kBlock;
  const double chain_at = logit_scale / temperature;

  for (int64_t start = 0; start < v; start += kBlock) {
    w.begin_block(start, stored < m);
    if (in_place && !accumulate_weight) {
      const int64_t held = overwrites && in_store > 0 ? slots[in_store - 1] + 1 : 0;
      touch_pages(static_cast<char*>(grad_weight->data_ptr()) + (start * d + held * w.columns) * sizeof(real), (d - held) * w.columns * sizeof(real), w.threads);
    }
    run_tasks(row_tasks(moved), w.threads, [&](int64_t t, int64_t) {
      for (int64_t i = t * 16; i < std::min(moved, (t + 1) * 16); ++i)
        std::copy_n(kept_real.row(slots[kWave + i], start, w.columns), w.columns, later.get() + i * kBlock);
    });
    for (int64_t wave = 0; wave < m; wave += kWave) {
      const int64_t end = std::min(m, wave + kWave);
      w.begin_wave(wave, end);
      if (end > stored) w.project(wave, std::max(wave, stored), end);
      run_tasks(row_tasks(end - wave), w.threads, [&](int64_t t, int64_t) {
        alignas(64) real z[kBlock];
        for (int64_t i = wave + t * 16; i < std::min(end, wave + (t + 1) * 16); ++i) {
          real* panels = w.z.get() + (i - wave) * w.k.nr;
          const real* logits = z;
          const uint16_t* half = nullptr;
          real row_offset = 0;
          if (i >= stored) {
            w.k.unpack_row(panels, w.z_stride, w.columns, z);
            w.k.finish_logits(z, w.columns, w.bias.get(), w.transform);
          } else if (kept_half != nullptr) {
            half = kept_half + slots[i] * v + start;
            row_offset = offset[slots[i] * tiles + start / kBlock];
          } else {
            const bool was_moved = moved > 0 && i >= kWave && i < in_store;
            logits = was_moved ? later.get() + (i - kWave) * kBlock : kept_real.row(slots[i], start, w.columns);
          }
          w.k.row_gradient(logits, w.columns, w.transform, half, row_offset, lse[i], prob_coef[i], slope ? slope[i] : real(0), slope != nullptr, panels,
                           w.z_stride);
          const int64_t local = label[i] - vocab_start - start;
          if (local >= 0 && local < w.columns) {  // from the exact target logit: 1 - p cancels
            const real p = std::exp(target[i] - lse[i]);
            const double ratio = softcap ? target[i] * temperature / softcap : 0.0;
            const real mass = prob_coef[i] + (slope ? slope[i] * target[i] : real(0));
            panels[local / w.k.nr * w.z_stride + local % w.k.nr] = static_cast<real>((target_coef[i] - p * mass) * chain_at * (1 - ratio * ratio));
          }
        }
      });
      const bool last = end == m, first_wave = wave == 0;
      const Grid hidden_grid(dh != nullptr ? end - wave : 0, d, w.threads), weight_grid(needs_weight ? w.columns : 0, d, w.threads);
      const int64_t products = hidden_grid.tasks + weight_grid.tasks;
      run_tasks(products + (db != nullptr ? 1 : 0), w.threads, [&](int64_t t, int64_t) {
        if (t == products) return w.k.add_column_sums(w.z.get(), w.z_stride, end - wave, w.columns, db + start);
        if (t < hidden_grid.tasks) return w.times_weight(hidden_grid.part(t), dh + wave * d);
        const Grid::Part part = weight_grid.part(t - hidden_grid.tasks);
        real* into = in_place ? static_cast<real*>(grad_weight->data_ptr()) + start * d : dw_block.get();
        w.times_hidden(wave, end - wave, part, into, !first_wave || (in_place && accumulate_weight));
        if (!in_place && last)
          for (int64_t c = part.row; c < part.row + part.count; ++c)
            store_row(w.k, into + c * d + part.column, part.width,
                      static_cast<char*>(grad_weight->data_ptr()) + ((start + c) * grad_weight->stride(0) + part.column) * element, weight_type,
                      accumulate_weight);
      });
    }
  }
}

bool wide(const Tensor& hidden, const Tensor& weight) {
  return hidden.scalar_type() == ScalarType::Double || weight.scalar_type() == ScalarType::Double;
}

bool in_bfloat16(const Tensor& hidden, const Tensor& weight) {
  return hidden.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16 && bf16_available();
}

// Operands of the bfloat16 kernel; `bias` receives the float32 bias.
Bf16Head bfloat16_head(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias_tensor, const Tensor& labels,
                       int64_t vocab_start, double logit_scale, double softcap, double temperature, std::vector<float>& bias) {
  const auto [m, d, v] = check(hidden, rows, weight, bias_tensor, labels);
  if (bias_tensor) {
    bias.resize(v);
    baseline::convert_row(bias_tensor->data_ptr(), Operand(*bias_tensor, ScalarType::Float).storage, v, bias.data());
  }
  return {static_cast<const uint16_t*>(hidden.data_ptr()), hidden.stride(0), static_cast<const int64_t*>(rows.data_ptr()),
          static_cast<const uint16_t*>(weight.data_ptr()), weight.stride(0), m, d, v, bias_tensor ? bias.data() : nullptr,
          static_cast<const int64_t*>(labels.data_ptr()), vocab_start,
          Transform{logit_scale, softcap, temperature, logit_scale == 1 && softcap == 0 && temperature == 1},
          std::max<int64_t>(1, torch::stable::get_num_threads())};
}

void forward_bfloat16(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias_tensor, const Tensor& labels,
                      int64_t vocab_start, double logit_scale, double softcap, double temperature, int64_t want, const Tensor& stats, const Tensor& argmax,
                      const std::optional<Tensor>& resident, const std::optional<Tensor>& offsets, const std::optional<Tensor>& direction) {
  std::vector<float> bias;
  const Bf16Head head = bfloat16_head(hidden, rows, weight, bias_tensor, labels, vocab_start, logit_scale, softcap, temperature, bias);
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Double && stats.is_contiguous() && stats.numel() == 6 * head.m,
                  "linear_logprob: stats must be (6, M) float64");
  STD_TORCH_CHECK(!resident || (offsets && resident->is_contiguous() && resident->scalar_type() == ScalarType::BFloat16 && resident->size(0) <= head.m),
                  "linear_logprob: resident must be contiguous bfloat16 rows with offsets");
  bf16_forward(head, {static_cast<int>(want), static_cast<double*>(stats.data_ptr()), want & kArgmax ? static_cast<int64_t*>(argmax.data_ptr()) : nullptr,
                      resident ? resident->size(0) : 0, optional_data<uint16_t>(resident), optional_data<float>(offsets), optional_data<float>(direction)});
}

void backward_bfloat16(const Tensor& hidden, const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias_tensor, const Tensor& labels,
                       int64_t vocab_start, double logit_scale, double softcap, double temperature, const Tensor& lse, const Tensor& target,
                       const Tensor& target_coef, const Tensor& prob_coef, const std::optional<Tensor>& slope, const std::optional<Tensor>& resident,
                       const std::optional<Tensor>& offsets, const std::optional<Tensor>& slots, const std::optional<Tensor>& grad_hidden,
                       const std::optional<Tensor>& grad_weight, bool accumulate_weight, const std::optional<Tensor>& grad_bias) {
  std::vector<float> bias;
  const Bf16Head head = bfloat16_head(hidden, rows, weight, bias_tensor, labels, vocab_start, logit_scale, softcap, temperature, bias);
  for (const Tensor* t : {&lse, &target, &target_coef, &prob_coef})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == head.m, "linear_logprob: row vectors must be (M,) float32");
  STD_TORCH_CHECK(!grad_weight || grad_weight->scalar_type() == ScalarType::BFloat16 || grad_weight->scalar_type() == ScalarType::Float,
                  "linear_logprob: grad_weight must be bfloat16 or float32");
  const auto column = [](const Tensor& t) { return static_cast<const float*>(t.data_ptr()); };
  bf16_backward(head, {column(lse), column(target), column(target_coef), column(prob_coef), optional_data<float>(slope),
                       resident && slots ? resident->size(0) : 0, optional_data<uint16_t>(resident), optional_data<float>(offsets),
                       optional_data<int64_t>(slots), optional_data<float>(grad_hidden), grad_weight ? grad_weight->data_ptr() : nullptr,
                       grad_weight ? grad_weight->stride(0) : 0, grad_weight && grad_weight->scalar_type() == ScalarType::Float, accumulate_weight,
                       optional_data<float>(grad_bias)});
}

void linear_logprob_fwd(Tensor hidden, Tensor rows, Tensor weight, std::optional<Tensor> bias, Tensor labels, int64_t vocab_start, double logit_scale,
                        double softcap, double temperature, int64_t want, Tensor stats, Tensor argmax, std::optional<Tensor> resident,
                        std::optional<Tensor> offsets, std::optional<Tensor> direction, std::optional<Tensor> store, int64_t kept) {
  if (in_bfloat16(hidden, weight))
    return forward_bfloat16(hidden, rows, weight, bias, labels, vocab_start, logit_scale, softcap, temperature, want, stats, argmax, resident, offsets, direction);
  auto run = wide(hidden, weight) ? forward<double> : forward<float>;
  run(hidden, rows, weight, bias, labels, vocab_start, logit_scale, softcap, temperature, want, stats, argmax, resident, offsets, direction, store, kept);
}

void linear_logprob_bwd(Tensor hidden, Tensor rows, Tensor weight, std::optional<Tensor> bias, Tensor labels, int64_t vocab_start, double logit_scale,
                        double softcap, double temperature, Tensor lse, Tensor target, Tensor target_coef, Tensor prob_coef, std::optional<Tensor> slope,
                        std::optional<Tensor> resident, std::optional<Tensor> offsets, std::optional<Tensor> slots, std::optional<Tensor> grad_hidden,
                        std::optional<Tensor> grad_weight, bool accumulate_weight, std::optional<Tensor> grad_bias, std::optional<Tensor> store) {
  if (in_bfloat16(hidden, weight))
    return backward_bfloat16(hidden, rows, weight, bias, labels, vocab_start, logit_scale, softcap, temperature, lse, target, target_coef, prob_coef, slope,
                             resident, offsets, slots, grad_hidden, grad_weight, accumulate_weight, grad_bias);
  auto run = wide(hidden, weight) ? backward<double> : backward<float>;
  run(hidden, rows, weight, bias, labels, vocab_start, logit_scale, softcap, temperature, lse, target, target_coef, prob_coef, slope, resident, offsets, slots,
      grad_hidden, grad_weight, accumulate_weight, grad_bias, store);
}

}  // namespace llmcore::linear_logprob

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("linear_logprob_fwd", TORCH_BOX(&llmcore::linear_logprob::linear_logprob_fwd));
  m.impl("linear_logprob_bwd", TORCH_BOX(&llmcore::linear_logprob::linear_logprob_bwd));
}
