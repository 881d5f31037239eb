// Activations to symmetric int8, and the choice between the two kernels.

#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "linear.h"
#include "weights.h"

KERNELS_BEGIN
namespace vlm_edge {
namespace {

// Largest magnitude of n values; NaN if any of them is NaN or infinite.
float largest(const float* x, size_t n) {
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512 most = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (size_t i = 0; i < n; i += 16) {
    __mmask16 mask = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
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
    __mmask16 take = i >= n ? 0 : n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
    __mmask16 put = padded - i < 16 ? (1u << (padded - i)) - 1 : 0xffff;
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(take, x + i), factor));
    sum = _mm512_add_epi32(sum, v);
    _mm_mask_storeu_epi8(q + i, put, _mm512_cvtsepi32_epi8(v));
  }
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace

void quantize(const Blocks& blocks, int offset, const float* x, size_t begin, size_t end,
              const Quantized& out) {
  for (size_t m = begin; m < end; ++m) {
    const float* row = x + m * blocks.k;
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
      out.start.get()[m * blocks.count + b] = -offset * sum;
    }
  }
}

}  // namespace vlm_edge
KERNELS_END

namespace vlm_edge {

namespace {
constexpr size_t kStreamed = 4;        // rows of x up to which the weights are not packed
constexpr size_t kQuantizedAtOnce = 8;  // rows of x
}  // namespace

void linear(const Linear& layer, size_t m, const float* x, float* y, const ParallelFor& parallel_for) {
  if (m == 0 || layer.n == 0) return;
  if (layer.k == 0) {
    for (size_t i = 0; i < m * layer.n; ++i) y[i] = layer.bias ? layer.bias[i % layer.n] : 0.0f;
    return;
  }
  Blocks blocks(layer);
  Quantized quantized(blocks, m);
  int offset = layer.format == WeightFormat::kInt8 ? Int8Weights::kOffset : Int4Weights::kOffset;
  parallel_for((m + kQuantizedAtOnce - 1) / kQuantizedAtOnce, [&](size_t i) {
    size_t begin = i * kQuantizedAtOnce;
    quantize(blocks, offset, x, begin, std::min(m, begin + kQuantizedAtOnce), quantized);
  });
  (m <= kStreamed ? gemv : gemm)(layer, blocks, m, quantized, y, parallel_for);
}

}  // namespace vlm_edge
