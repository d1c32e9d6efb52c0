// Zeroth-order gradients on CUDA devices: the operators of csrc/cpu/zeroth_order.cpp, drawn in registers.
//
//   zeroth_order_directions  one thread per Philox counter, four normals, one 16-byte store
//   zeroth_order_perturb     one thread owns 16 bytes of D of one (query, direction) and streams a share of the tokens past its directions
//   zeroth_order_combine     one block per (query, 1024 elements of D), float64 sums, partial norms added in order by a second kernel
//
// Bound: memory, (1 + P) B T D itemsize bytes; loads and stores are 16 bytes wide where pointers and strides allow it, single elements else.
// Numerics: Philox words exact; float32 Box-Muller within 2e-6 of the float64 rows (3e-4 where the first uniform is next to 1).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "common/philox.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Kind : int64_t { kGaussian = 0, kSphere = 1, kAntithetic = 2 };

constexpr int kThreads = 256;
constexpr int kTokens = 16;                     // tokens a thread streams past its directions: pays for the draw, leaves enough blocks
constexpr int kCombineWidth = 4 * kThreads;     // elements of D of one combine block
static_assert(kThreads % 32 == 0, "reductions shuffle whole warps");

// -ln((x + 1/2) 2^-32). Next to 1 the rounded uniform loses its argument: there the series in 1 - u, whose complement is exact.
__device__ __forceinline__ float minus_log(uint32_t x) {
  const float u = (static_cast<float>(x) + 0.5f) * 0x1p-32f, t = (static_cast<float>(~x) + 0.5f) * 0x1p-32f;
  const float near_one = t * (1.0f + t * (0.5f + t * (0.33333333f + t * (0.25f + t * 0.2f))));
  return t < 0.015625f ? near_one : -logf(u);
}

// Elements 4 block … 4 block + 3 of direction `row`.
__device__ __forceinline__ float4 normals(uint64_t seed, uint32_t row, uint32_t block) {
  const llmcore::PhiloxWords w = llmcore::philox(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), block, row, 0, llmcore::kDirectionStream);
  // The signed word is the same angle modulo a turn and keeps its bits near both ends; sincospif reduces it exactly.
  const float r0 = sqrtf(2.0f * minus_log(w.x[0])), r1 = sqrtf(2.0f * minus_log(w.x[2]));
  float s0, c0, s1, c1;
  sincospif((static_cast<float>(static_cast<int32_t>(w.x[1])) + 0.5f) * 0x1p-31f, &s0, &c0);
  sincospif((static_cast<float>(static_cast<int32_t>(w.x[3])) + 0.5f) * 0x1p-31f, &s1, &c1);
  return {r0 * c0, r0 * s0, r1 * c1, r1 * s1};
}

__global__ void __launch_bounds__(kThreads) directions_kernel(const int64_t* __restrict__ seeds, float* __restrict__ out, int64_t directions, int64_t dim,
                                                              int64_t half) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, first = 4 * block;
  if (first >= dim) return;
  const int64_t j = blockIdx.y, s = blockIdx.z;
  const bool mirrored = j >= half;
  float4 z = normals(static_cast<uint64_t>(seeds[s]), static_cast<uint32_t>(mirrored ? j - half : j), static_cast<uint32_t>(block));
  if (mirrored) z = {-z.x, -z.y, -z.z, -z.w};
  float* target = out + (s * directions + j) * dim + first;
  if (first + 4 <= dim && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
    *reinterpret_cast<float4*>(target) = z;
  } else {
    const float values[4] = {z.x, z.y, z.z, z.w};
    for (int i = 0; i < 4 && first + i < dim; ++i) target[i] = values[i];
  }
}

// Rows scaled to norm sqrt(D): one block a row, float64 sum in a fixed order.
__global__ void __launch_bounds__(kThreads) sphere_kernel(float* __restrict__ rows, int64_t dim) {
  __shared__ double sums[kThreads];
  float* row = rows + static_cast<int64_t>(blockIdx.x) * dim;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) sum += static_cast<double>(row[i]) * row[i];
  sums[threadIdx.x] = sum;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();  // the previous step's sums are complete before anyone reads them
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
  }
  __syncthreads();
  const double factor = sqrt(static_cast<double>(dim)) / sqrt(sums[0]);
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) row[i] = static_cast<float>(row[i] * factor);
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

struct Perturb {
  const bool* moves;
  const float* table;
  int64_t length, dim, table_stride, e_b, e_t, o_b, o_p, o_t;
  double smoothing;
};

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const T* __restrict__ embeddings, T* __restrict__ out, Perturb a) {
  constexpr int kWidth = kWide ? 16 / sizeof(T) : 1;
  struct alignas(kWide ? 16 : sizeof(T)) Pack {
    T v[kWidth];
  };
  const int64_t b = blockIdx.z, j = blockIdx.y, packs = (a.dim + kWidth - 1) / kWidth, blocks = (packs + kThreads - 1) / kThreads;
  const int64_t pack = blockIdx.x % blocks * kThreads + threadIdx.x, first = blockIdx.x / blocks * kTokens;
  if (pack >= packs) return;
  using Acc = decltype(widen(T{}));
  Acc shift[kWidth];
  const float* u = a.table + b * a.table_stride + j * a.dim + pack * kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) shift[i] = static_cast<Acc>(a.smoothing) * static_cast<Acc>(u[i]);
  const T* source = embeddings + b * a.e_b + pack * kWidth;
  T* target = out + b * a.o_b + j * a.o_p + pack * kWidth;
  const int64_t last = min(first + kTokens, a.length);
#pragma unroll 4
  for (int64_t t = first; t < last; ++t) {
    Pack value = *reinterpret_cast<const Pack*>(source + t * a.e_t);
    if (a.moves[b * a.length + t]) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) narrow(widen(value.v[i]) + shift[i], value.v[i]);
    }
    *reinterpret_cast<Pack*>(target + t * a.o_t) = value;
  }
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const int64_t* __restrict__ seeds, const double* __restrict__ coefficients,
                                                           double* __restrict__ partial, double* __restrict__ gradient, int64_t directions, int64_t half,
                                                           int64_t dim) {
  __shared__ double sums[kThreads];
  const int64_t b = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * kCombineWidth + 4 * threadIdx.x;
  double total[4] = {0, 0, 0, 0};
  if (first < dim) {
    const uint64_t seed = static_cast<uint64_t>(seeds[b]);
    for (int64_t j = 0; j < half; ++j) {
      double c = coefficients[b * directions + j];
      if (half < directions) c -= coefficients[b * directions + j + half];
      const float4 z = normals(seed, static_cast<uint32_t>(j), static_cast<uint32_t>(first / 4));
      total[0] += c * z.x;
      total[1] += c * z.y;
      total[2] += c * z.z;
      total[3] += c * z.w;
    }
  }
  double sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < dim) {
      sum += total[i] * total[i];
      if (gradient != nullptr) gradient[b * dim + first + i] = total[i];
    }
  }
  sums[threadIdx.x] = sum;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
  }
  if (threadIdx.x == 0) partial[b * gridDim.x + blockIdx.x] = sums[0];
}

// Partial norms of one query in block order: the same sum on every run.
__global__ void norm_kernel(const double* __restrict__ partial, double* __restrict__ square, int64_t queries, int64_t blocks) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= queries) return;
  double sum = 0;
  for (int64_t i = 0; i < blocks; ++i) sum += partial[b * blocks + i];
  square[b] = sum;
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "zeroth_order: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

int64_t blocks_of(int64_t count, int64_t width) { return (count + width - 1) / width; }

Tensor on_device(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) { return torch::stable::new_empty(like, shape, dtype); }

void check_seeds(const Tensor& seeds, const char* name) {
  STD_TORCH_CHECK(seeds.is_cuda() && seeds.dim() == 1 && seeds.is_contiguous() && seeds.scalar_type() == ScalarType::Long, name,
                  ": seeds must be contiguous (S,) int64 on a CUDA device");
}

Tensor zeroth_order_directions(Tensor seeds, int64_t num_directions, int64_t dim, int64_t kind, bool double_precision) {
  check_seeds(seeds, "zeroth_order_directions");
  STD_TORCH_CHECK(num_directions >= 0 && dim >= 1 && kind >= kGaussian && kind <= kAntithetic, "zeroth_order_directions: bad size or kind");
  const int64_t count = seeds.size(0), half = kind == kAntithetic ? num_directions / 2 : num_directions;
  STD_TORCH_CHECK(num_directions < 65536 && count < 65536, "zeroth_order_directions: at most 65535 directions and seeds a launch");
  const torch::stable::accelerator::DeviceGuard guard(seeds.get_device_index());
  Tensor rows = on_device(seeds, {count, num_directions, dim}, ScalarType::Float);
  if (count * num_directions > 0) {
    const dim3 grid(blocks_of(dim, 4 * kThreads), num_directions, count);
    directions_kernel<<<grid, kThreads, 0, current_stream(seeds)>>>(seeds.const_data_ptr<int64_t>(), rows.mutable_data_ptr<float>(), num_directions, dim, half);
    if (kind == kSphere) sphere_kernel<<<count * num_directions, kThreads, 0, current_stream(seeds)>>>(rows.mutable_data_ptr<float>(), dim);
    check_launch("zeroth_order_directions");
  }
  return double_precision ? torch::stable::to(rows, ScalarType::Double) : rows;
}

template <typename T>
void launch_perturb(const Tensor& embeddings, const Tensor& out, const Perturb& a) {
  const auto* e = static_cast<const T*>(embeddings.const_data_ptr());
  auto* o = static_cast<T*>(out.mutable_data_ptr());
  constexpr int64_t kWidth = 16 / sizeof(T);
  bool wide = reinterpret_cast<uintptr_t>(e) % 16 == 0 && reinterpret_cast<uintptr_t>(o) % 16 == 0 && a.dim % kWidth == 0;
  for (const int64_t stride : {a.e_b, a.e_t, a.o_b, a.o_p, a.o_t}) wide = wide && stride % kWidth == 0;
  const int64_t packs = wide ? a.dim / kWidth : a.dim;
  const dim3 grid(blocks_of(packs, kThreads) * blocks_of(a.length, kTokens), out.size(1), out.size(0));
  const cudaStream_t stream = current_stream(embeddings);
  if (wide) {
    perturb_kernel<T, true><<<grid, kThreads, 0, stream>>>(e, o, a);
  } else {
    perturb_kernel<T, false><<<grid, kThreads, 0, stream>>>(e, o, a);
  }
  check_launch("zeroth_order_perturb");
}

void zeroth_order_perturb(Tensor embeddings, Tensor token_mask, Tensor table, double smoothing, Tensor out) {
  STD_TORCH_CHECK(embeddings.is_cuda() && token_mask.is_cuda() && table.is_cuda() && out.is_cuda(), "zeroth_order_perturb: tensors must be on a CUDA device");
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
  STD_TORCH_CHECK(B < 65536 && P < 65536, "zeroth_order_perturb: at most 65535 queries and directions a launch");
  if (B * P * T * D == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(embeddings.get_device_index());
  const Perturb a{static_cast<const bool*>(token_mask.const_data_ptr()), table.const_data_ptr<float>(), T, D, table.size(0) == 1 ? 0 : P * D,
                  embeddings.stride(0), embeddings.stride(1), out.stride(0), out.stride(1), out.stride(2), smoothing};
  switch (embeddings.scalar_type()) {
    case ScalarType::Float: return launch_perturb<float>(embeddings, out, a);
    case ScalarType::Double: return launch_perturb<double>(embeddings, out, a);
    case ScalarType::BFloat16: return launch_perturb<__nv_bfloat16>(embeddings, out, a);
    case ScalarType::Half: return launch_perturb<__half>(embeddings, out, a);
    default: STD_TORCH_CHECK(false, "zeroth_order_perturb: dtype must be float32, float64, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> zeroth_order_combine(Tensor seeds, Tensor coefficients, int64_t dim, int64_t kind, bool want_gradient) {
  check_seeds(seeds, "zeroth_order_combine");
  STD_TORCH_CHECK(coefficients.is_cuda() && coefficients.dim() == 2 && coefficients.is_contiguous() && coefficients.size(0) == seeds.size(0) &&
                      coefficients.scalar_type() == ScalarType::Double,
                  "zeroth_order_combine: coefficients must be contiguous (B, P) float64 on the seeds' device");
  STD_TORCH_CHECK(dim >= 1 && (kind == kGaussian || kind == kAntithetic) && seeds.size(0) < 65536, "zeroth_order_combine: bad size or kind");
  const int64_t B = seeds.size(0), P = coefficients.size(1), blocks = blocks_of(dim, kCombineWidth);
  const torch::stable::accelerator::DeviceGuard guard(seeds.get_device_index());
  Tensor square = on_device(seeds, {B}, ScalarType::Double), partial = on_device(seeds, {B, blocks}, ScalarType::Double);
  Tensor gradient = on_device(seeds, {B, want_gradient ? dim : 0}, ScalarType::Double);
  if (B > 0) {
    const cudaStream_t stream = current_stream(seeds);
    combine_kernel<<<dim3(blocks, B), kThreads, 0, stream>>>(seeds.const_data_ptr<int64_t>(), coefficients.const_data_ptr<double>(),
                                                             partial.mutable_data_ptr<double>(),
                                                             want_gradient ? gradient.mutable_data_ptr<double>() : nullptr, P,
                                                             kind == kAntithetic ? P / 2 : P, dim);
    norm_kernel<<<blocks_of(B, kThreads), kThreads, 0, stream>>>(partial.const_data_ptr<double>(), square.mutable_data_ptr<double>(), B, blocks);
    check_launch("zeroth_order_combine");
  }
  return {square, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CUDA, m) {
  m.impl("zeroth_order_directions", TORCH_BOX(&zeroth_order_directions));
  m.impl("zeroth_order_perturb", TORCH_BOX(&zeroth_order_perturb));
  m.impl("zeroth_order_combine", TORCH_BOX(&zeroth_order_combine));
}
