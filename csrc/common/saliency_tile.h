// Register-tiled core of saliency flow on a CPU, free of torch headers. This file has no include guard on purpose: csrc/cpu/saliency_flow.cpp
// includes it once for each vector width, inside its own namespace and under its own target pragma, with
//   LLMCORE_LANES  floats in a vector        LLMCORE_ROWS  rows of a register tile (kRows · 2 accumulators must fit the register file)
//
// A register tile is kRows x kCols entries (kCols = 2 vectors). Rows (query, grad_output) are packed [depth][kRows], columns (key, value)
// [depth][kCols], so the inner loop of both products loads two vectors and broadcasts kRows scalars. Between the products and the bins an
// entry lives in a buffer of a few hundred bytes: nothing of size rows x columns is written.
//
// Invariant: after panel p, bins (double) + lanes (float, at most kFlush panels old) hold the sums over the visible columns < (p + 1) · kCols.

typedef float vec __attribute__((vector_size(LLMCORE_LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LLMCORE_LANES * 4)));
typedef float uvec __attribute__((vector_size(LLMCORE_LANES * 4), aligned(4), may_alias));
typedef int32_t uivec __attribute__((vector_size(LLMCORE_LANES * 4), aligned(4), may_alias));

constexpr int kLanes = LLMCORE_LANES;
constexpr int kRows = LLMCORE_ROWS;
constexpr int kVecs = 2;
constexpr int kCols = kLanes * kVecs;
constexpr int kFlush = 32;  // panels between two flushes of the float lanes: bounds their rounding to 32 additions
static_assert(kChunkRows % kRows == 0, "a chunk of rows is a whole number of register tiles");

static inline vec load(const float* p) { return *reinterpret_cast<const uvec*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<uvec*>(p) = x; }
static inline vec all(float x) { return x - vec{}; }  // x - 0 is x for every x, -0 and NaN too, so this is one broadcast; 0 + x would add
static inline vec select(ivec mask, vec a) { return (vec)((ivec)a & mask); }  // bitwise: a masked NaN becomes 0
static inline vec absolute(vec x) { return (vec)((ivec)x & (ivec{} + 0x7fffffff)); }

static inline double lane_sum(const float* p) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += p[i];
  return total;
}

// NaN stays NaN: the second operand of the instruction is what it returns then.
static inline vec at_least(float least, vec x) {
#if LLMCORE_LANES == 16
  return (vec)_mm512_maskz_max_ps(0xffff, (__m512)all(least), (__m512)x);
#elif LLMCORE_LANES == 8
  return (vec)_mm256_max_ps((__m256)all(least), (__m256)x);
#else
  return x < least ? all(least) : x;
#endif
}

static inline vec at_most(float most, vec x) {
#if LLMCORE_LANES == 16
  return (vec)_mm512_maskz_min_ps(0xffff, (__m512)all(most), (__m512)x);
#elif LLMCORE_LANES == 8
  return (vec)_mm256_min_ps((__m256)all(most), (__m256)x);
#else
  return x > most ? all(most) : x;
#endif
}

// 2^x: round to n + f, f in [-1/2, 1/2], polynomial of relative error 2e-9, exponent by bits. NaN stays NaN, at most 2^127; n = -127 has the bits of 0, so that
// -inf gives 0 exactly.
static inline vec exp2_vec(vec x) {
  x = at_most(127.f, at_least(-127.f, x));
  const vec t = x + 12582912.f;
  const vec f = x - (t - 12582912.f);
  vec p = all(1.53458124e-4f);
  p = p * f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.f;
  return p * (vec)(((ivec)t + 127) << 23);
}

// tanh: odd polynomial near 0 (no cancellation), 1 - 2 / (e^2|y| + 1) elsewhere.
static inline vec tanh_vec(vec y) {
  const vec a = absolute(y);
  const vec z = y * y;
  vec p = all(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vec small = y + y * z * p;
  const vec large = 1.f - 2.f / (exp2_vec(a * 2.885390082f) + 1.f);
  return a < 0.625f ? small : (y < 0.f ? -large : large);
}

// out[kRows][kCols] = a[depth][kRows]^T b[depth][kCols]
static inline void product(const float* __restrict a, const float* __restrict b, int64_t depth, float* __restrict out) {
  vec acc[kRows][kVecs] = {};
  for (int64_t i = 0; i < depth; ++i) {
    const vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vec ar = all(a[r]);
      acc[r][0] += ar * b0;
      acc[r][1] += ar * b1;
    }
    a += kRows;
    b += kCols;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(out + r * kCols, acc[r][0]);
    store(out + r * kCols + kLanes, acc[r][1]);
  }
}

// Columns [start, start + kCols) of a (count, depth) matrix as one panel [depth][kCols], zero behind the end.
template <typename T>
static void pack_panel(const T* source, int64_t stride, int64_t depth, int64_t start, int64_t count, float* panel) {
  constexpr int64_t kStreams = 8;  // columns read side by side, so that a run of a panel's row is written at once
  for (int64_t c = 0; c < kCols; c += kStreams) {
    const T* from[kStreams];
    for (int64_t r = 0; r < kStreams; ++r) from[r] = source + std::min(start + c + r, count - 1) * stride;
    for (int64_t i = 0; i < depth; ++i)
#pragma GCC unroll 8
      for (int64_t r = 0; r < kStreams; ++r) panel[i * kCols + c + r] = static_cast<float>(from[r][i]);
  }
  for (int64_t c = std::max<int64_t>(count - start, 0); c < kCols; ++c)
    for (int64_t i = 0; i < depth; ++i) panel[i * kCols + c] = 0.f;
}

struct Workspace {  // one thread's buffers
  std::vector<float> query, grad, lanes, columns;
  std::vector<double> bins;
  std::vector<RowInfo> rows;
  std::vector<uint8_t> wanted;
};

// Rows of one head, packed into strips of kRows; missing rows of the last strip are zero. Stores run along memory, kRows streams are read.
template <typename T>
static void pack_rows(const T* source, int64_t stride, int64_t depth, const std::vector<RowInfo>& rows, float factor, float* packed) {
  const int64_t count = static_cast<int64_t>(rows.size());
  for (int64_t first = 0; first < count; first += kRows, packed += kRows * depth) {
    const T* from[kRows];
    for (int64_t r = 0; r < kRows; ++r) from[r] = source + rows[std::min(first + r, count - 1)].index * stride;
    for (int64_t j = 0; j < depth; ++j)
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) packed[j * kRows + r] = static_cast<float>(from[r][j]) * factor;
    for (int64_t r = count - first; r < kRows; ++r)
      for (int64_t j = 0; j < depth; ++j) packed[j * kRows + r] = 0.f;
  }
}

struct Tile {  // P (probabilities) and G = P · D of one register tile, 0 where not visible
  alignas(64) float p[kRows * kCols];
  alignas(64) float g[kRows * kCols];
};

// One register tile. rows: the strip's rows; lse2: their lse in base 2 (+inf for a row that sees nothing, so that its P is 0).
static inline void compute_tile(const Problem& problem, const float* query, const float* grad, const float* key, const float* value, const RowInfo* rows,
                                int row_count, const float* lse2, int64_t first, const int32_t* valid, bool whole, Tile& tile) {
  product(query, key, problem.depth, tile.p);
  product(grad, value, problem.value_depth, tile.g);
  const bool capped = problem.softcap > 0;
  const float to_unit = capped ? 1.f / problem.softcap : 0.f, from_unit = problem.softcap * 1.44269504088896f;
  for (int r = 0; r < row_count; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* p = tile.p + r * kCols + v * kLanes;
      float* g = tile.g + r * kCols + v * kLanes;
      vec s = load(p);
      if (capped) s = from_unit * tanh_vec(s * to_unit);
      vec e = exp2_vec(s - lse2[r]);
      vec x = e * load(g);
      if (!whole) {
        const int32_t base = static_cast<int32_t>(first) + v * kLanes;
        const ivec column = *reinterpret_cast<const uivec*>(kIota) + base;
        ivec mask = (column >= rows[r].low) & (column < rows[r].high) & (column != rows[r].diagonal);
        if (valid != nullptr) mask &= *reinterpret_cast<const uivec*>(valid + v * kLanes);
        e = select(mask, e);
        x = select(mask, x);
      }
      store(p, e);
      store(g, x);
    }
  }
}

static inline float bin_value(int kind, float p, float g) {
  return kind == kAbs ? std::fabs(g) : kind == kSigned ? g : kind == kPositive ? (g > 0 ? g : g != g ? g : 0.f) : p;
}

static inline vec bin_value(int kind, vec p, vec g) {
  return kind == kAbs ? absolute(g) : kind == kSigned ? g : kind == kPositive ? (g < 0.f ? vec{} : g) : p;
}

// Panels that a chunk may touch and the bookkeeping shared by both kinds of unit.
static bool panel_wanted(const Problem& problem, int64_t batch, int64_t panel, const std::vector<uint8_t>& wanted) {
  const int32_t uniform = problem.panel_segment[batch * problem.panels + panel];
  if (uniform != kMixed) return uniform >= 0 && wanted[uniform];
  const int32_t* segments = problem.column_segment + batch * problem.columns;
  for (int64_t c = panel * kCols; c < std::min<int64_t>((panel + 1) * kCols, problem.columns); ++c)
    if (segments[c] >= 0 && wanted[segments[c]]) return true;
  return false;
}

// Rows [begin, end) of batch's list, for one head (head >= 0: sums of each kind) or over all heads (head < 0: abs of the sum over heads).
template <typename T>
static void run_rows(const Problem& problem, const Tensors<T>& t, int64_t batch, int64_t head, const int32_t* list, int64_t count, double* partial,
                     double* column_bins, Workspace& work) {
  const bool over_heads = head < 0;
  const int64_t heads = over_heads ? problem.heads : 1, first_head = over_heads ? 0 : head;
  const int64_t segments = problem.column_segments, depth = problem.depth, value_depth = problem.value_depth;
  const int kinds = over_heads ? 1 : problem.kind_count;
  const float log2e = 1.44269504088896f;

  std::vector<RowInfo>& rows = work.rows;
  rows.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = list[i], at = batch * problem.rows + index;
    bool live = problem.keep_zero_rows || over_heads;
    if (!live) {
      const T* grad = t.grad + batch * t.grad_stride[0] + head * t.grad_stride[1] + index * t.grad_stride[2];
      for (int64_t j = 0; j < value_depth && !live; ++j) live = static_cast<float>(grad[j]) != 0.f;  // a NaN is live
    }
    if (live)
      rows.push_back({static_cast<int32_t>(index), problem.low[at], problem.high[at], problem.diagonal == nullptr ? -1 : problem.diagonal[at],
                      problem.row_segment[at]});
  }
  if (rows.empty()) return;
  const int64_t row_count = static_cast<int64_t>(rows.size()), strips = (row_count + kRows - 1) / kRows;

  work.wanted.assign(segments, 0);
  int64_t low = problem.columns, high = 0;
  for (const RowInfo& row : rows) {
    low = std::min<int64_t>(low, row.low);
    high = std::max<int64_t>(high, row.high);
    for (int64_t s = 0; s < segments; ++s) work.wanted[s] |= problem.pairs[row.segment * segments + s];
  }
  work.query.resize(heads * strips * kRows * depth);
  work.grad.resize(heads * strips * kRows * value_depth);
  std::vector<float> lse2(heads * strips * kRows, std::numeric_limits<float>::infinity());
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t source = first_head + h;
    pack_rows(t.query + batch * t.query_stride[0] + source * t.query_stride[1], t.query_stride[2], depth, rows,
              problem.softcap > 0 ? problem.scale : problem.scale * log2e, work.query.data() + h * strips * kRows * depth);
    pack_rows(t.grad + batch * t.grad_stride[0] + source * t.grad_stride[1], t.grad_stride[2], value_depth, rows, 1.f,
              work.grad.data() + h * strips * kRows * value_depth);
    const float* lse = problem.lse + (batch * problem.heads + source) * problem.rows;
    for (int64_t i = 0; i < row_count; ++i) {
      const float x = lse[rows[i].index];
      lse2[h * strips * kRows + i] = x == -std::numeric_limits<float>::infinity() ? std::numeric_limits<float>::infinity() : x * log2e;
    }
  }
  work.bins.assign(kinds * row_count * segments, 0.0);
  work.lanes.assign(kinds * row_count * kLanes, 0.f);
  double* bins = work.bins.data();
  float* lanes = work.lanes.data();

  int32_t current = -1;
  int pending = 0;
  auto flush = [&] {
    if (current >= 0 && pending > 0)
      for (int64_t i = 0; i < kinds * row_count; ++i) {
        bins[i * segments + current] += lane_sum(lanes + i * kLanes);
        std::fill(lanes + i * kLanes, lanes + (i + 1) * kLanes, 0.f);
      }
    pending = 0;
  };

  Tile tile, sum;
  alignas(64) int32_t valid[kCols];
  for (int64_t panel = low / kCols; panel * kCols < high; ++panel) {
    if (!panel_wanted(problem, batch, panel, work.wanted)) continue;
    const int64_t first = panel * kCols;
    const int32_t uniform = problem.panel_segment[batch * problem.panels + panel];
    const int32_t* column_segment = problem.column_segment + batch * problem.columns + first;
    if (uniform != kMixed && (uniform != current || pending >= kFlush)) {
      flush();
      current = uniform;
    }
    const int32_t* mask = nullptr;
    if (problem.key_valid != nullptr) {
      for (int64_t c = 0; c < kCols; ++c)
        valid[c] = first + c < problem.columns && problem.key_valid[batch * problem.columns + first + c] ? -1 : 0;
      mask = valid;
    }
    bool touched = false;
    if (column_bins != nullptr) work.columns.assign(kCols, 0.f);
    int32_t column_row_segment = rows[0].segment;
    auto flush_columns = [&] {
      for (int64_t c = 0; c < std::min<int64_t>(kCols, problem.columns - first); ++c)
        column_bins[column_row_segment * problem.columns + first + c] += work.columns[c];
      work.columns.assign(kCols, 0.f);
    };
    for (int64_t strip = 0; strip < strips; ++strip) {
      const RowInfo* strip_rows = rows.data() + strip * kRows;
      const int present = static_cast<int>(std::min<int64_t>(kRows, row_count - strip * kRows));
      int32_t low_min = strip_rows[0].low, low_max = low_min, high_min = strip_rows[0].high, high_max = high_min;
      bool diagonal = false;
      for (int r = 0; r < present; ++r) {
        low_min = std::min(low_min, strip_rows[r].low), low_max = std::max(low_max, strip_rows[r].low);
        high_min = std::min(high_min, strip_rows[r].high), high_max = std::max(high_max, strip_rows[r].high);
        diagonal |= strip_rows[r].diagonal >= first && strip_rows[r].diagonal < first + kCols;
      }
      if (high_max <= first || low_min >= first + kCols) continue;
      const bool whole = low_max <= first && high_min >= first + kCols && mask == nullptr && !diagonal;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t kv = (batch * problem.kv_heads + (first_head + h) / (problem.heads / problem.kv_heads)) * problem.panels + panel;
        compute_tile(problem, work.query.data() + (h * strips + strip) * kRows * depth, work.grad.data() + (h * strips + strip) * kRows * value_depth,
                     problem.keys + kv * depth * kCols, problem.values + kv * value_depth * kCols, strip_rows, present,
                     lse2.data() + (h * strips + strip) * kRows, first, mask, whole, tile);
        if (over_heads) {
          if (h == 0) std::copy(tile.g, tile.g + present * kCols, sum.g);
          else
            for (int i = 0; i < present * kCols; ++i) sum.g[i] += tile.g[i];
        }
      }
      touched = true;
      const Tile& result = over_heads ? sum : tile;
      for (int k = 0; k < kinds; ++k) {
        const int kind = over_heads ? kAbs : problem.kinds[k];
        for (int r = 0; r < present; ++r) {
          const int64_t i = k * row_count + strip * kRows + r;
          const float* p = result.p + r * kCols;
          const float* g = result.g + r * kCols;
          if (uniform != kMixed) {
            float* lane = lanes + i * kLanes;
            store(lane, load(lane) + (bin_value(kind, load(p), load(g)) + bin_value(kind, load(p + kLanes), load(g + kLanes))));
          } else {
            double* bin = bins + i * segments;
            const int64_t end = std::min<int64_t>(kCols, problem.columns - first);
            for (int64_t c = 0; c < end; ++c)
              if (column_segment[c] >= 0) bin[column_segment[c]] += bin_value(kind, p[c], g[c]);
          }
        }
      }
      if (column_bins != nullptr)
        for (int r = 0; r < present; ++r) {
          if (strip_rows[r].segment != column_row_segment) {
            flush_columns();
            column_row_segment = strip_rows[r].segment;
          }
          for (int c = 0; c < kCols; ++c) work.columns[c] += std::fabs(result.g[r * kCols + c]);
        }
      if (problem.matrix != nullptr && !over_heads)
        for (int r = 0; r < present; ++r) {
          float* target = problem.matrix + ((batch * problem.heads + head) * problem.rows + strip_rows[r].index) * problem.columns + first;
          for (int64_t c = 0; c < std::min<int64_t>(kCols, problem.columns - first); ++c) target[c] = std::fabs(result.g[r * kCols + c]);
        }
    }
    if (touched && uniform != kMixed) ++pending;
    if (column_bins != nullptr) flush_columns();
  }
  flush();

  for (int k = 0; k < kinds; ++k)
    for (int64_t i = 0; i < row_count; ++i) {
      const double* bin = bins + (k * row_count + i) * segments;
      double* target = partial + (k * problem.row_segments + rows[i].segment) * segments;
      const uint8_t* pair = problem.pairs + rows[i].segment * segments;
      for (int64_t s = 0; s < segments; ++s)
        if (pair[s]) target[s] += bin[s];
      if (problem.row_bins != nullptr && !over_heads && problem.kinds[k] == kAbs) {
        float* out = problem.row_bins + ((batch * problem.heads + head) * problem.rows + rows[i].index) * segments;
        for (int64_t s = 0; s < segments; ++s)
          if (pair[s]) out[s] = static_cast<float>(bin[s]);
      }
    }
}

template <typename T>
static void pack_columns(Problem& problem, const Tensors<T>& t, int64_t item) {
  const int64_t panel = item % problem.panels, head = item / problem.panels % problem.kv_heads, batch = item / problem.panels / problem.kv_heads;
  if (!problem.panel_needed[batch * problem.panels + panel]) return;
  pack_panel(t.key + batch * t.key_stride[0] + head * t.key_stride[1], t.key_stride[2], problem.depth, panel * kCols, problem.columns,
             problem.keys + item * problem.depth * kCols);
  pack_panel(t.value + batch * t.value_stride[0] + head * t.value_stride[1], t.value_stride[2], problem.value_depth, panel * kCols, problem.columns,
             problem.values + item * problem.value_depth * kCols);
}
