// AVX-512 pieces of both ways of attention.
#pragma once

#include <cstdint>

#include "isa.h"

KERNELS_BEGIN

namespace vlm_edge {
namespace simd {

constexpr int64_t LANES = 16;
constexpr float LOWEST = -3.0e38f;  // before the first score: finite, so that LOWEST - LOWEST is 0

inline __mmask16 mask(int64_t lanes) {
  return lanes >= LANES ? 0xffff : lanes <= 0 ? 0 : static_cast<__mmask16>((1u << lanes) - 1);
}

// 2^x to 9e-8 (relative); 0 for -infinity, NaN for NaN. 2^x = 2^floor(x) p(x - floor(x)) with p the
// polynomial of least relative error on [0, 1] that has p(0) = 1.
inline __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x09);  // x - floor(x); 0 for infinities
  __m512 p = _mm512_set1_ps(0.0018671307f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0090170287f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0557999146f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2401644496f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931513119f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);  // floors x
}
inline float exp2(float x) { return _mm512_cvtss_f32(exp2(_mm512_set1_ps(x))); }

// Scores outside [first, end) become -infinity; `vectors` vectors of 16 scores. Returns the largest of
// each lane.
inline __m512 hide(float* s, int64_t vectors, int64_t first, int64_t end) {
  const __m512 never = _mm512_set1_ps(-__builtin_inff());
  __m512 top = _mm512_set1_ps(LOWEST);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t at = v * LANES;
    const __mmask16 seen = mask(end - at) & ~mask(first - at);
    const __m512 score = _mm512_mask_loadu_ps(never, seen, s + at);
    if (seen != 0xffff) _mm512_store_ps(s + at, score);
    top = _mm512_max_ps(top, score);
  }
  return top;
}

// Lane 4 i + e of the result is the sum of a[4 i + e]'s lanes.
inline __m512 sums(const __m512 (&a)[16]) {
  __m512 quarter[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    const __m512 x = a[e], y = a[4 + e], z = a[8 + e], w = a[12 + e];
    const __m512 xy = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    const __m512 zw = _mm512_add_ps(_mm512_shuffle_f32x4(z, w, 0x44), _mm512_shuffle_f32x4(z, w, 0xee));
    quarter[e] = _mm512_add_ps(_mm512_shuffle_f32x4(xy, zw, 0x88), _mm512_shuffle_f32x4(xy, zw, 0xdd));
  }
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(quarter[0], quarter[1]),
                                  _mm512_unpackhi_ps(quarter[0], quarter[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(quarter[2], quarter[3]),
                                  _mm512_unpackhi_ps(quarter[2], quarter[3]));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  return _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
}

// 16 x 16 words of 32 bits, in place.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_unpacklo_epi32(r[4 * i], r[4 * i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(r[4 * i], r[4 * i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[4 * i + 2], r[4 * i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(r[4 * i + 2], r[4 * i + 3]);
    t[4 * i] = _mm512_unpacklo_epi64(a, c);
    t[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
    t[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
    t[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // t[4 i + e]: for each quarter l, column 4 l + e of rows 4 i .. 4 i + 3.
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    const __m512i a = _mm512_shuffle_i32x4(t[e], t[4 + e], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(t[e], t[4 + e], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(t[8 + e], t[12 + e], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(t[8 + e], t[12 + e], 0xee);
    r[e] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[4 + e] = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[8 + e] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[12 + e] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace simd
}  // namespace vlm_edge

KERNELS_END
