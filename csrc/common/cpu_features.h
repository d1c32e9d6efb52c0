// Run-time CPU dispatch: what this machine can execute, asked once. Nothing here is compiled with -march=native; vectorised functions
// carry __attribute__((target(...))) and are reached only through cpu_level() or cpu_has_amx().
//
// LLMCORE_CPU_ISA=baseline|avx2|avx512|avx512_bf16|amx caps what is used (read once, when the first kernel asks): tests run every level
// that the CPU has on one machine.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmcore {

enum class CpuLevel : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

inline int cpu_level_cap() {
  const char* asked = std::getenv("LLMCORE_CPU_ISA");
  if (asked == nullptr) return 4;
  const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int i = 0; i < 5; ++i)
    if (std::strcmp(asked, names[i]) == 0) return i;
  return 4;
}

inline CpuLevel cpu_level() {
#if defined(__x86_64__)
  static const CpuLevel level = [] {
    __builtin_cpu_init();
    const int cap = cpu_level_cap();
    if (cap >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      return cap >= 3 && __builtin_cpu_supports("avx512bf16") ? CpuLevel::kAvx512Bf16 : CpuLevel::kAvx512;
    }
    if (cap >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
    return CpuLevel::kBaseline;
  }();
  return level;
#else
  return CpuLevel::kBaseline;
#endif
}

// AMX tiles with bfloat16 products. The kernel grants the tile registers to a process that asks; a refusal means no AMX.
inline bool cpu_has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (cpu_level_cap() < 4 || cpu_level() < CpuLevel::kAvx512Bf16 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (d & kAmxBf16) && (d & kAmxTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace llmcore
