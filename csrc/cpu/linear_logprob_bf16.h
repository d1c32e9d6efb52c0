// The bfloat16 kernel of the fused linear log-probability (linear_logprob_bf16.cpp), free of tensors: raw rows in, statistics and gradients out.
#pragma once

#include "cpu/linear_logprob_common.h"

namespace llmcore::linear_logprob {

// AVX-512 with bfloat16 dot products at least; tiles of AMX where the CPU has them.
bool bf16_available();

struct Bf16Head {
  const uint16_t* hidden;  // row rows[i] of it is scored row i
  int64_t hidden_ld;
  const int64_t* rows;
  const uint16_t* weight;
  int64_t weight_ld, m, d, v;
  const float* bias;  // (v) or null
  const int64_t* label;
  int64_t vocab_start;
  Transform transform;
  int64_t threads;
};

struct Bf16Forward {
  int want;
  double* stats;         // (6, m): max, sum, target, shifted, sum_sq, sum_z
  int64_t* argmax;       // (m) or null
  int64_t kept;          // leading rows whose exponentials stay
  uint16_t* resident;    // panels of 32 rows: [v][lanes], lanes = 32 but for the last panel of `kept`
  float* offset;         // (kept, ceil(v / kBlock))
  float* direction;      // (m, d) or null
};

struct Bf16Backward {
  const float *lse, *target, *target_coef, *prob_coef, *slope;  // (m); slope may be null
  int64_t kept;
  const uint16_t* resident;
  const float* offset;
  const int64_t* slots;  // (m): kept row or -1; kept rows first, ascending
  float* grad_hidden;    // (m, d) or null
  void* grad_weight;     // (v, d) of 16-bit or float32 rows, or null
  int64_t grad_weight_ld;
  bool grad_weight_is_float, accumulate;
  float* grad_bias;  // (v) or null
};

void bf16_forward(const Bf16Head& head, const Bf16Forward& out);
void bf16_backward(const Bf16Head& head, const Bf16Backward& io);

}  // namespace llmcore::linear_logprob
