// What goes into the cache and comes out of it: rotated keys and values, in float32 or rounded to int8.

#include <cstring>

#include "attention_detail.h"
#include "attention_simd.h"

KERNELS_BEGIN

namespace vlm_edge {
namespace {

using namespace simd;

// One row to int8, symmetrically: its scale is largest magnitude / 127. As export/layers/cache.py does it.
void quantize(const float* x, int64_t width, int8_t* out, float* scale) {
  __m512 top = _mm512_setzero_ps();
  for (int64_t c = 0; c < width; c += LANES) {
    const __m512 each = _mm512_maskz_loadu_ps(mask(width - c), x + c);
    top = _mm512_max_ps(_mm512_abs_ps(each), top);  // top where one is NaN: NaN stays
    top = _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(each, each, _CMP_UNORD_Q), each);
  }
  const bool nan = _mm512_cmp_ps_mask(top, top, _CMP_UNORD_Q);
  *scale = nan ? __builtin_nanf("") : std::max(_mm512_reduce_max_ps(top) / 127.0f, 1e-30f);
  const __m512 divisor = _mm512_set1_ps(*scale);
  for (int64_t c = 0; c < width; c += LANES) {
    const __mmask16 lanes = mask(width - c);
    const __m512 each = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes, x + c), divisor);
    _mm512_mask_cvtsepi32_storeu_epi8(out + c, lanes, _mm512_cvtps_epi32(each));  // to nearest even
  }
}

}  // namespace

void dequantize(const HeadOf<int8_t>& rows, int64_t count, int64_t width, float* out) {
  for (int64_t j = 0; j < count; ++j, out += width) {
    const int8_t* row = rows.data + j * rows.stride;
    const __m512 scale = _mm512_set1_ps(rows.scales[j]);
    for (int64_t c = 0; c < width; c += LANES) {
      const __mmask16 lanes = mask(width - c);
      const __m128i eight = _mm_maskz_loadu_epi8(lanes, row + c);
      _mm512_mask_storeu_ps(out + c, lanes, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(eight)), scale));
    }
  }
}

void write_cache(const Problem& problem, int64_t b, int64_t h, int64_t begin, int64_t end) {
  if (!problem.cache) return;
  static thread_local Buffer buffer;
  const auto& s = problem.shape;
  const CacheArray &keys = problem.cache->keys, &values = problem.cache->values;
  const int64_t start = problem.start(b), at = (b * s.kv_heads + h) * problem.cache->capacity;
  float* rotated = reinterpret_cast<float*>(buffer.get(s.head_dim * sizeof(float)));
  for (int64_t p = std::max(begin, start); p < std::min(end, start + s.queries); ++p) {
    const int64_t from = problem.offset(b, s.queries, p - start, s.kv_heads, h);
    const int64_t row = at + p, to = row * s.head_dim;
    if (keys.floats) {
      rotate(problem, b, p - start, problem.k + from, 1.0f, keys.floats + to);
      std::memcpy(values.floats + to, problem.v + from, s.head_dim * sizeof(float));
    } else {
      rotate(problem, b, p - start, problem.k + from, 1.0f, rotated);
      quantize(rotated, s.head_dim, keys.rounded + to, keys.scales + row);
      quantize(problem.v + from, s.head_dim, values.rounded + to, values.scales + row);
    }
  }
}

}  // namespace vlm_edge

KERNELS_END
