// Saliency flow on a CPU: sums of |A · dL/dA| over pairs of segments, the attention matrix A never stored.
//
//   A_ij = exp(s_ij - lse_i), s_ij = softcap(scale · q_i·k_j)      dA_ij = do_i·v_j      G = A · dA      bins[s, t] = sum over rows of s, columns of t of |G|
//
// Layout: query (B, H, nq, d), key (B, Hk, nk, d), value (B, Hk, nk, dv), grad (B, H, nq, dv), last stride 1; float, bfloat16 or half. Row i of a sequence sees
// columns [low_i, high_i) that are valid and are not its diagonal. Segments are ids in [0, Sr) and [0, Sc); -1 takes part in nothing.
//
// Parallel split: units of (batch, head, chunk of rows). A unit owns its partial sums (double); a fixed-order pass adds the partials of a head, so the result depends
// neither on the thread count nor on what else is in the batch. Rows whose grad is zero and rows and panels of no wanted pair are dropped before any product.
// Numerics: products, exp and lanes in float32, bins in double, results in float32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/cpu_features.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int kChunkRows = 96;      // q and do of a chunk at head_dim 64: 48 KB, in the second cache; a K and V panel: 8 KB, in the first
constexpr int kHeadsumRows = 24;    // all heads of a chunk are packed at once
constexpr int64_t kBinBudget = 1 << 16;  // doubles of a chunk's bins, and of all partials of one head, before splitting stops
constexpr int32_t kMixed = -2;      // a panel with columns of several segments

enum Kind : int { kAbs = 0, kSigned = 1, kPositive = 2, kAttention = 3 };
enum Output : int64_t { kHeadsum = 16, kRowBins = 32, kColumnBins = 64, kMatrix = 128 };  // bits 0..3: kinds

alignas(64) constexpr int32_t kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct RowInfo {
  int32_t index, low, high, diagonal, segment;
};

struct Problem {
  int64_t batch, heads, kv_heads, rows, columns, depth, value_depth, row_segments, column_segments, panels;
  float scale, softcap;
  bool keep_zero_rows;
  int kind_count, kinds[4];
  const float* lse;
  const int32_t *low, *high, *diagonal, *row_segment, *column_segment;
  const uint8_t *key_valid, *pairs;
  const int32_t* panel_segment;  // (batch, panels): the panel's one segment, -1 when none of its columns has one, kMixed
  const uint8_t* panel_needed;
  float *keys, *values;  // packed panels (batch, kv_heads, panels, depth, panel width)
  float *row_bins, *matrix;
};

template <typename T>
struct Tensors {
  const T *query, *key, *value, *grad;
  int64_t query_stride[3], key_stride[3], value_stride[3], grad_stride[3];
};

#define LLMCORE_LANES 4
#define LLMCORE_ROWS 4
namespace baseline {
#include "common/saliency_tile.h"
}
#undef LLMCORE_LANES
#undef LLMCORE_ROWS

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LLMCORE_LANES 8
#define LLMCORE_ROWS 6
namespace avx2 {
#include "common/saliency_tile.h"
}
#undef LLMCORE_LANES
#undef LLMCORE_ROWS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define LLMCORE_LANES 16
#define LLMCORE_ROWS 12
namespace avx512 {
#include "common/saliency_tile.h"
}
#undef LLMCORE_LANES
#undef LLMCORE_ROWS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <typename T>
struct Core {  // one instruction set's entry points
  int columns;
  void (*pack)(Problem&, const Tensors<T>&, int64_t);
  void (*run)(const Problem&, const Tensors<T>&, int64_t, int64_t, const int32_t*, int64_t, double*, double*, void*);
  void* (*make_workspace)();
  void (*free_workspace)(void*);
};

#define LLMCORE_CORE(ns)                                                                                                                       \
  Core<T> {                                                                                                                                    \
    ns::kCols, &ns::pack_columns<T>,                                                                                                           \
        [](const Problem& p, const Tensors<T>& t, int64_t b, int64_t h, const int32_t* list, int64_t count, double* partial, double* columns, \
           void* work) { ns::run_rows<T>(p, t, b, h, list, count, partial, columns, *static_cast<ns::Workspace*>(work)); },                    \
        []() -> void* { return new ns::Workspace; }, [](void* work) { delete static_cast<ns::Workspace*>(work); }                              \
  }

template <typename T>
Core<T> core() {
#if defined(__x86_64__)
  switch (llmcore::cpu_level()) {
    case llmcore::CpuLevel::kAvx512:
    case llmcore::CpuLevel::kAvx512Bf16:
      return LLMCORE_CORE(avx512);
    case llmcore::CpuLevel::kAvx2:
      return LLMCORE_CORE(avx2);
    default:
      break;
  }
#endif
  return LLMCORE_CORE(baseline);
}

void check(const Tensor& t, const char* name, std::vector<int64_t> shape, ScalarType dtype, bool contiguous) {
  bool same = t.dim() == static_cast<int64_t>(shape.size()) && t.scalar_type() == dtype && (!contiguous || t.is_contiguous());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape[i];
  STD_TORCH_CHECK(same, "saliency_flow: ", name, " has the wrong shape, dtype or layout");
  STD_TORCH_CHECK(t.is_cpu(), "saliency_flow: ", name, " must be on the CPU");
}

template <typename T>
void bind(const Tensor& t, const T*& pointer, int64_t* stride) {
  pointer = static_cast<const T*>(t.const_data_ptr());
  for (int i = 0; i < 3; ++i) stride[i] = t.stride(i);
}

// Every unit once, in parallel, heavy (late) chunks first. body(unit, workspace).
template <typename T, typename Body>
void for_units(const Core<T>& core, int64_t units, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(units, torch::stable::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      void* work = core.make_workspace();
      for (int64_t i = next.fetch_add(1); i < units; i = next.fetch_add(1)) body(units - 1 - i, work);
      core.free_workspace(work);
    }
  });
}

template <typename T>
void run(Problem& problem, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad, float* bins, float* headsum, float* column_bins) {
  const Core<T> core = ::core<T>();
  Tensors<T> t;
  bind(query, t.query, t.query_stride);
  bind(key, t.key, t.key_stride);
  bind(value, t.value, t.value_stride);
  bind(grad, t.grad, t.grad_stride);

  const int64_t width = core.columns, B = problem.batch, H = problem.heads, Sr = problem.row_segments, Sc = problem.column_segments;
  problem.panels = (problem.columns + width - 1) / width;
  std::vector<int32_t> panel_segment(B * problem.panels);
  std::vector<uint8_t> panel_needed(B * problem.panels), column_wanted(Sc), row_wanted(Sr);
  for (int64_t s = 0; s < Sr; ++s)
    for (int64_t c = 0; c < Sc; ++c)
      if (problem.pairs[s * Sc + c]) row_wanted[s] = column_wanted[c] = 1;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t p = 0; p < problem.panels; ++p) {
      const int32_t* segment = problem.column_segment + b * problem.columns;
      const int64_t first = p * width, end = std::min(first + width, problem.columns);
      int32_t uniform = segment[first];
      for (int64_t c = first; c < end; ++c) {
        if (segment[c] != uniform) uniform = kMixed;
        if (segment[c] >= 0 && column_wanted[segment[c]]) panel_needed[b * problem.panels + p] = 1;
      }
      panel_segment[b * problem.panels + p] = uniform;
    }
  problem.panel_segment = panel_segment.data();
  problem.panel_needed = panel_needed.data();

  std::vector<std::vector<int32_t>> lists(B);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < problem.rows; ++i) {
      const int32_t segment = problem.row_segment[b * problem.rows + i];
      if (segment >= 0 && row_wanted[segment] && problem.low[b * problem.rows + i] < problem.high[b * problem.rows + i])
        lists[b].push_back(static_cast<int32_t>(i));
    }

  const int64_t items = B * problem.kv_heads * problem.panels;
  Tensor keys = torch::stable::empty({std::max<int64_t>(1, items * problem.depth * width)}, ScalarType::Float);
  Tensor values = torch::stable::empty({std::max<int64_t>(1, items * problem.value_depth * width)}, ScalarType::Float);
  problem.keys = static_cast<float*>(keys.mutable_data_ptr());
  problem.values = static_cast<float*>(values.mutable_data_ptr());
  torch::stable::parallel_for(0, items, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) core.pack(problem, t, i);
  });

  // Sizes from shapes alone, so that neither threads nor neighbours in the batch change the order of a sum.
  auto chunk_rows = [&](int64_t most) { return std::max<int64_t>(12, std::min(most, kBinBudget / std::max<int64_t>(1, Sc) / 12 * 12)); };
  if (problem.kind_count > 0) {
    const int64_t chunk = chunk_rows(kChunkRows), chunks = (problem.rows + chunk - 1) / chunk, size = problem.kind_count * Sr * Sc;
    const bool split = column_bins == nullptr && size * chunks <= kBinBudget;
    const int64_t parts = split ? chunks : 1;
    std::vector<double> partial(B * H * parts * size, 0.0);
    for_units(core, B * H * parts, [&](int64_t unit, void* work) {
      const int64_t b = unit / parts / H, h = unit / parts % H, part = unit % parts;
      const std::vector<int32_t>& list = lists[b];
      const int64_t count = static_cast<int64_t>(list.size());
      std::vector<double> columns(column_bins == nullptr ? 0 : Sr * problem.columns, 0.0);
      for (int64_t start = split ? part * chunk : 0; start < (split ? std::min(count, (part + 1) * chunk) : count); start += chunk)
        core.run(problem, t, b, h, list.data() + start, std::min(chunk, count - start), partial.data() + unit * size,
                 column_bins == nullptr ? nullptr : columns.data(), work);
      if (column_bins != nullptr)
        std::transform(columns.begin(), columns.end(), column_bins + (b * H + h) * Sr * problem.columns, [](double x) { return static_cast<float>(x); });
    });
    for (int64_t bh = 0; bh < B * H; ++bh)
      for (int64_t i = 0; i < size; ++i) {
        double total = 0;
        for (int64_t part = 0; part < parts; ++part) total += partial[(bh * parts + part) * size + i];
        bins[(i / (Sr * Sc) * B * H + bh) * Sr * Sc + i % (Sr * Sc)] = static_cast<float>(total);
      }
  }
  if (headsum != nullptr) {
    const int64_t chunk = chunk_rows(kHeadsumRows), chunks = (problem.rows + chunk - 1) / chunk, size = Sr * Sc;
    const bool split = size * chunks <= kBinBudget;
    const int64_t parts = split ? chunks : 1;
    std::vector<double> partial(B * parts * size, 0.0);
    for_units(core, B * parts, [&](int64_t unit, void* work) {
      const int64_t b = unit / parts, part = unit % parts, count = static_cast<int64_t>(lists[b].size());
      for (int64_t start = split ? part * chunk : 0; start < (split ? std::min(count, (part + 1) * chunk) : count); start += chunk)
        core.run(problem, t, b, -1, lists[b].data() + start, std::min(chunk, count - start), partial.data() + unit * size, nullptr, work);
    });
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < size; ++i) {
        double total = 0;
        for (int64_t part = 0; part < parts; ++part) total += partial[(b * parts + part) * size + i];
        headsum[b * size + i] = static_cast<float>(total);
      }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> saliency_flow_fwd(Tensor query, Tensor key, Tensor value, Tensor grad, Tensor lse, Tensor low, Tensor high,
                                                                     std::optional<Tensor> diagonal, std::optional<Tensor> key_valid, Tensor row_segment,
                                                                     Tensor column_segment, Tensor pairs, double scale, double softcap, int64_t outputs) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && grad.dim() == 4 && pairs.dim() == 2, "saliency_flow: tensors must have 4 dimensions");
  Problem problem{};
  const int64_t B = problem.batch = query.size(0), H = problem.heads = query.size(1), nq = problem.rows = query.size(2);
  const int64_t Hk = problem.kv_heads = key.size(1), nk = problem.columns = key.size(2), d = problem.depth = query.size(3);
  const int64_t dv = problem.value_depth = value.size(3), Sr = problem.row_segments = pairs.size(0), Sc = problem.column_segments = pairs.size(1);
  const ScalarType dtype = query.scalar_type();
  check(query, "query", {B, H, nq, d}, dtype, false);
  check(key, "key", {B, Hk, nk, d}, dtype, false);
  check(value, "value", {B, Hk, nk, dv}, dtype, false);
  check(grad, "grad", {B, H, nq, dv}, dtype, false);
  STD_TORCH_CHECK(H % std::max<int64_t>(Hk, 1) == 0, "saliency_flow: num_heads must be a multiple of num_kv_heads");
  for (const Tensor* t : {&query, &key, &value, &grad})
    STD_TORCH_CHECK(t->stride(3) == 1 || t->size(3) == 1, "saliency_flow: the last stride must be 1");
  check(lse, "lse", {B, H, nq}, ScalarType::Float, true);
  check(low, "low", {B, nq}, ScalarType::Int, true);
  check(high, "high", {B, nq}, ScalarType::Int, true);
  check(row_segment, "row_segment", {B, nq}, ScalarType::Int, true);
  check(column_segment, "column_segment", {B, nk}, ScalarType::Int, true);
  check(pairs, "pairs", {Sr, Sc}, ScalarType::Byte, true);
  if (diagonal.has_value()) check(*diagonal, "diagonal", {B, nq}, ScalarType::Int, true);
  if (key_valid.has_value()) check(*key_valid, "key_valid", {B, nk}, ScalarType::Byte, true);

  problem.scale = static_cast<float>(scale);
  problem.softcap = static_cast<float>(softcap);
  problem.lse = static_cast<const float*>(lse.const_data_ptr());
  problem.low = static_cast<const int32_t*>(low.const_data_ptr());
  problem.high = static_cast<const int32_t*>(high.const_data_ptr());
  problem.row_segment = static_cast<const int32_t*>(row_segment.const_data_ptr());
  problem.column_segment = static_cast<const int32_t*>(column_segment.const_data_ptr());
  problem.pairs = static_cast<const uint8_t*>(pairs.const_data_ptr());
  problem.diagonal = diagonal.has_value() ? static_cast<const int32_t*>(diagonal->const_data_ptr()) : nullptr;
  problem.key_valid = key_valid.has_value() ? static_cast<const uint8_t*>(key_valid->const_data_ptr()) : nullptr;
  for (int64_t i = 0; i < B * nq; ++i)
    STD_TORCH_CHECK(problem.row_segment[i] >= -1 && problem.row_segment[i] < Sr && problem.low[i] >= 0 && problem.high[i] <= nk,
                    "saliency_flow: a row's segment or visible range is out of bounds");
  for (int64_t i = 0; i < B * nk; ++i)
    STD_TORCH_CHECK(problem.column_segment[i] >= -1 && problem.column_segment[i] < Sc, "saliency_flow: a column's segment is out of bounds");
  for (int kind = 0; kind < 4; ++kind)
    if (outputs >> kind & 1) problem.kinds[problem.kind_count++] = kind;
  STD_TORCH_CHECK(problem.kind_count > 0 || !(outputs & (kRowBins | kColumnBins | kMatrix)), "saliency_flow: row, column and matrix outputs need a kind");
  problem.keep_zero_rows = (outputs >> kAttention & 1) != 0;

  auto zeros = [](std::vector<int64_t> shape) {
    Tensor result = torch::stable::empty(shape, ScalarType::Float);
    torch::stable::zero_(result);
    return result;
  };
  Tensor bins = zeros({problem.kind_count, B, H, Sr, Sc});
  Tensor headsum = zeros(outputs & kHeadsum ? std::vector<int64_t>{B, Sr, Sc} : std::vector<int64_t>{0});
  Tensor row_bins = zeros(outputs & kRowBins ? std::vector<int64_t>{B, H, nq, Sc} : std::vector<int64_t>{0});
  Tensor column_bins = zeros(outputs & kColumnBins ? std::vector<int64_t>{B, H, Sr, nk} : std::vector<int64_t>{0});
  Tensor matrix = zeros(outputs & kMatrix ? std::vector<int64_t>{B, H, nq, nk} : std::vector<int64_t>{0});
  auto pointer = [](const Tensor& t, bool wanted) { return wanted ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; };
  problem.row_bins = pointer(row_bins, outputs & kRowBins);
  problem.matrix = pointer(matrix, outputs & kMatrix);
  if (B * H * nq * nk * Sr * Sc > 0) {
    float* column_pointer = pointer(column_bins, outputs & kColumnBins);
    float* headsum_pointer = pointer(headsum, outputs & kHeadsum);
    float* bin_pointer = static_cast<float*>(bins.mutable_data_ptr());
    if (dtype == ScalarType::Float) run<float>(problem, query, key, value, grad, bin_pointer, headsum_pointer, column_pointer);
    else if (dtype == ScalarType::BFloat16) run<torch::headeronly::BFloat16>(problem, query, key, value, grad, bin_pointer, headsum_pointer, column_pointer);
    else if (dtype == ScalarType::Half) run<torch::headeronly::Half>(problem, query, key, value, grad, bin_pointer, headsum_pointer, column_pointer);
    else STD_TORCH_CHECK(false, "saliency_flow: dtype must be float32, bfloat16 or float16");
  }
  return {bins, headsum, row_bins, column_bins, matrix};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { m.impl("saliency_flow_fwd", TORCH_BOX(&saliency_flow_fwd)); }
