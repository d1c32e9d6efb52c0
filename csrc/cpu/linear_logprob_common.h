// What the float32/float64 and the bfloat16 kernels of the fused linear log-probability share: tasks, scratch, and one call's numbers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace llmcore::linear_logprob {

enum Want : int { kEntropy = 1, kSumSq = 2, kMean = 4, kArgmax = 8 };  // as in linear_logprob_core.py

constexpr int64_t kBlock = 512;  // vocabulary columns that share one offset of the resident exponentials

struct Transform {
  double logit_scale, softcap, temperature;
  bool identity;
};

// Tasks taken in turn by the pool's threads. A task's result must not depend on who runs it or when.
template <typename F>
void run_tasks(int64_t count, int64_t threads, const F& task) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(count, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t t = next.fetch_add(1); t < count; t = next.fetch_add(1)) task(t, worker);
  });
}

template <typename T>
struct Buffer {
  explicit Buffer(int64_t count) : data_(count > 0 ? static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)) : nullptr) {
    STD_TORCH_CHECK(count <= 0 || data_ != nullptr, "linear_logprob: out of memory for ", count * sizeof(T), " bytes of scratch");
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  T* get() const { return data_; }
  T* data_;
};

}  // namespace llmcore::linear_logprob
