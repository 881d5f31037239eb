// What this processor can do at best, for benchmarks: kernels are measured against it.
// Each runs on the calling thread; the caller starts one in each of its threads.

#include <cstddef>
#include <cstdint>

#include "isa.h"

#define VLM_EDGE_EXPORT extern "C" __attribute__((visibility("default")))

KERNELS_BEGIN
using vlm_edge::unrolled;

// Reads `bytes` bytes (a multiple of 256) and returns their sum, so that nothing is left out.
VLM_EDGE_EXPORT int64_t vlm_edge_read(const uint8_t* data, size_t bytes) {
  __m512i sum[4] = {};
  for (size_t i = 0; i < bytes; i += 256) {
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(data + i + 4096 + 64 * j, _MM_HINT_T0);
      sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(data + i + 64 * j));
    }
  }
  __m512i all = _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3]));
  int64_t lanes[8];
  _mm512_storeu_si512(lanes, all);
  int64_t total = 0;
  for (int64_t lane : lanes) total += lane;
  return total;
}

// 16 independent vpdpbusd, `rounds` times: 16 * 64 * 2 operations a round.
VLM_EDGE_EXPORT int64_t vlm_edge_dot(size_t rounds) {
  __m512i sum[16], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
  unrolled<16>([&](auto i) INLINED { sum[i] = _mm512_setzero_si512(); });
  for (size_t r = 0; r < rounds; ++r) {
    unrolled<16>([&](auto i) INLINED {
      sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
      asm volatile("" : "+v"(sum[i]));  // or the compiler would do all rounds at once
    });
  }
  __m512i all = sum[0];
  unrolled<16>([&](auto i) INLINED { all = _mm512_add_epi32(all, sum[i]); });
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(all));
}

KERNELS_END
