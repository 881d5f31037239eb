// Activations to symmetric int8, after their norm.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "linear.h"

KERNELS_BEGIN
namespace vlm_edge {
namespace {

__mmask16 lanes(size_t left) { return left < 16 ? (1u << left) - 1 : 0xffff; }

// Largest magnitude of n values; NaN if any of them is NaN or infinite. As integers, the bits of
// magnitudes are in order, NaN and infinity last.
float largest(const float* x, size_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most[4] = {};
  const auto look = [&](__m512i& m, __mmask16 mask, const float* at) INLINED {
    m = _mm512_max_epu32(m, _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, at), magnitude));
  };
  size_t i = 0;
  for (; i + 64 <= n; i += 64) unrolled<4>([&](auto j) INLINED { look(most[j], 0xffff, x + i + 16 * j); });
  for (; i < n; i += 16) look(most[0], lanes(n - i), x + i);
  const uint32_t all = _mm512_reduce_max_epu32(
      _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3])));
  float value;
  std::memcpy(&value, &all, sizeof value);
  return std::isfinite(value) ? value : std::numeric_limits<float>::quiet_NaN();
}

// 16 of x * inverse as integers between -127 and 127.
ALWAYS_INLINE __m512i rounded(__m512 x, __m512 inverse) {
  const __m512 most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
  return _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(x, inverse), most), least));
}

// q = round(x * inverse) of n values, at most 127 in magnitude, zeros up to `padded`; returns the sum of q.
int32_t round_all(const float* x, size_t n, size_t padded, float inverse, int8_t* q) {
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i ones = _mm512_set1_epi8(1);
  // The pack instructions work within quarters: this puts groups of four bytes back into order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i sum = _mm512_setzero_si512();
  size_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i v[4];
    unrolled<4>([&](auto j) INLINED {
      v[j] = rounded(_mm512_loadu_ps(x + i + 16 * j), factor);
    });
    const __m512i low = _mm512_packs_epi32(v[0], v[1]), high = _mm512_packs_epi32(v[2], v[3]);
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
    sum = _mm512_dpbusd_epi32(sum, ones, bytes);
    _mm512_storeu_si512(q + i, bytes);
  }
  for (; i < padded; i += 16) {
    __mmask16 take = i >= n ? 0 : lanes(n - i);
    __mmask16 put = lanes(padded - i);
    __m512i v = rounded(_mm512_maskz_loadu_ps(take, x + i), factor);
    sum = _mm512_add_epi32(sum, v);
    _mm_mask_storeu_epi8(q + i, put, _mm512_cvtsepi32_epi8(v));
  }
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace

void quantize(const float* row, size_t m, float clip, const Quantized& out) {
  const Blocks& blocks = out.blocks;
  float inverse = 0;
  auto scale_of = [&](size_t at, size_t n) {
    float amax = std::min(largest(row + at, n), clip);  // in this order a NaN stays
    inverse = 127.0f / amax;
    // Zeros, or values too small to have an inverse, are zeros. A NaN stays in the scale.
    if (std::isfinite(inverse)) return amax / 127.0f;
    inverse = 0;
    return std::isnan(amax) ? amax : 0.0f;
  };
  if (!blocks.scaled) out.scale.get()[m] = scale_of(0, blocks.k);
  for (size_t b = 0; b < blocks.count; ++b) {
    size_t at = b * blocks.size, rows = blocks.rows(b);
    if (blocks.scaled) out.scale.get()[m * blocks.count + b] = scale_of(at, rows);
    int8_t* q = out.q.get() + m * blocks.row_bytes() + b * blocks.padded;
    // 0 * NaN is NaN, and NaN as an integer is INT_MIN: such rows are written as zeros.
    int32_t sum = 0;
    if (inverse != 0) {
      sum = round_all(row + at, rows, blocks.padded, inverse, q);
    } else {
      std::memset(q, 0, blocks.padded);
    }
    out.sum.get()[m * blocks.count + b] = sum;
  }
}

void normalise(const float* x, const Norm& norm, size_t k, float* y) {
  // f(low half, high half) of every 16 values as doubles.
  const auto halves = [&](const auto& f) INLINED {
    for (size_t i = 0; i < k; i += 16) {
      const __mmask16 mask = lanes(k - i);
      const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
      f(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
    }
  };
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd(), sum = low;
  if (norm.bias) {
    halves([&](__m512d a, __m512d b) INLINED { sum = _mm512_add_pd(sum, _mm512_add_pd(a, b)); });
  }
  const double mean = _mm512_reduce_add_pd(sum) / double(k);
  halves([&](__m512d a, __m512d b) INLINED {
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  });
  const double squares = _mm512_reduce_add_pd(_mm512_add_pd(low, high)) / double(k);
  // Doubles leave this difference exact enough for any float32 mean below 1e4 deviations.
  const double variance = std::max(0.0, squares - mean * mean);
  const float factor = float(1 / std::sqrt(variance + norm.epsilon));
  const __m512 times = _mm512_set1_ps(factor), centre = _mm512_set1_ps(float(mean));
  for (size_t i = 0; i < k; i += 16) {
    const __mmask16 mask = lanes(k - i);
    __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    if (norm.bias) v = _mm512_sub_ps(v, centre);
    v = _mm512_mul_ps(_mm512_mul_ps(v, times), _mm512_maskz_loadu_ps(mask, norm.scale + i));
    if (norm.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, norm.bias + i));
    _mm512_mask_storeu_ps(y + i, mask, v);
  }
}

}  // namespace vlm_edge
KERNELS_END
