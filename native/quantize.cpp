// Activations to symmetric int8, after their norm.

#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "linear.h"

KERNELS_BEGIN
namespace vlm_edge {
namespace {

__mmask16 lanes(size_t left) { return left < 16 ? (1u << left) - 1 : 0xffff; }

// Largest magnitude of n values; NaN if any of them is NaN or infinite.
float largest(const float* x, size_t n) {
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512 most = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (size_t i = 0; i < n; i += 16) {
    __mmask16 mask = lanes(n - i);
    __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, x + i));
    bad |= _mm512_cmp_ps_mask(v, infinity, _CMP_NLT_UQ);
    most = _mm512_max_ps(most, v);
  }
  return bad ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
}

// q = round(x * inverse) of n values, zeros up to `padded`; returns the sum of q.
int32_t round_all(const float* x, size_t n, size_t padded, float inverse, int8_t* q) {
  const __m512 factor = _mm512_set1_ps(inverse);
  __m512i sum = _mm512_setzero_si512();
  for (size_t i = 0; i < padded; i += 16) {
    __mmask16 take = i >= n ? 0 : lanes(n - i);
    __mmask16 put = lanes(padded - i);
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(take, x + i), factor));
    sum = _mm512_add_epi32(sum, v);
    _mm_mask_storeu_epi8(q + i, put, _mm512_cvtsepi32_epi8(v));
  }
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace

void quantize(const float* row, size_t m, const Quantized& out) {
  const Blocks& blocks = out.blocks;
  float inverse = 0;
  auto scale_of = [&](size_t at, size_t n) {
    float amax = largest(row + at, n);
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

void normalise(const float* x, const float* norm, float epsilon, size_t k, float* y) {
  __m512d squares[2] = {};
  for (size_t i = 0; i < k; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(lanes(k - i), x + i);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    squares[0] = _mm512_fmadd_pd(low, low, squares[0]);
    squares[1] = _mm512_fmadd_pd(high, high, squares[1]);
  }
  const double mean = _mm512_reduce_add_pd(_mm512_add_pd(squares[0], squares[1])) / double(k);
  const __m512 factor = _mm512_set1_ps(float(1 / std::sqrt(mean + epsilon)));
  for (size_t i = 0; i < k; i += 16) {
    const __mmask16 mask = lanes(k - i);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
    _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, norm + i)));
  }
}

}  // namespace vlm_edge
KERNELS_END
