// extension_info: the widest vector instruction set that this CPU offers the run-time dispatch (0 baseline, 1 AVX2+FMA,
// 2 AVX-512, 3 AVX-512 with bf16 dot products).
#include <torch/csrc/stable/library.h>

#include "common/cpu_features.h"

namespace {
int64_t extension_info() { return static_cast<int64_t>(llmcore::cpu_level()); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CompositeExplicitAutograd, m) { m.impl("extension_info", TORCH_BOX(&extension_info)); }
