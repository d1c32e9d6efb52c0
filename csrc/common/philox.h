// Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from a 64-bit key and a 128-bit counter, as one inline function for host
// and device. Streams: the fourth counter word says which use draws, so uses never share numbers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LLMCORE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LLMCORE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace llmcore {

constexpr uint32_t kDirectionStream = 0x47434431u;  // direction row j, elements 4b…4b+3: counter (b, j, 0, stream)

struct PhiloxWords {
  uint32_t x[4];
};

LLMCORE_HOST_DEVICE PhiloxWords philox(uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = static_cast<uint64_t>(0xD2511F53u) * c0, odd = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(odd >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(even >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(odd);
    c3 = static_cast<uint32_t>(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace llmcore
