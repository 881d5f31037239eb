// Activations to about 1e-7 of the largest value near them, gates and sums, 16 values at a time.

#include "epilogue.h"

#include "attention_simd.h"
#include "isa.h"

KERNELS_BEGIN
namespace vlm_edge {
namespace {

// v * sigmoid(a) to 3e-7 (relative).
ALWAYS_INLINE __m512 times_sigmoid(__m512 v, __m512 a) {
  // exp of -|a| never overflows; 2^t needs t more exactly than a float holds it.
  const __m512 log2e = _mm512_set1_ps(1.44269502f), log2e_rest = _mm512_set1_ps(1.92596299e-8f);
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(a)));
  const __m512 t = _mm512_mul_ps(x, log2e);
  const __m512 rest = _mm512_fmadd_ps(x, log2e_rest, _mm512_fmsub_ps(x, log2e, t));
  const __m512 power = simd::exp2(t);
  const __m512 e = _mm512_fmadd_ps(_mm512_mul_ps(power, _mm512_set1_ps(0.693147181f)), rest, power);
  const __m512 one = _mm512_set1_ps(1.0f);
  const __mmask16 negative = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_div_ps(_mm512_mul_ps(v, _mm512_mask_mov_ps(one, negative, e)), _mm512_add_ps(one, e));
}

template <size_t N>
ALWAYS_INLINE __m512 polynomial(const float (&coefficients)[N], __m512 x) {
  __m512 sum = _mm512_set1_ps(coefficients[N - 1]);
  unrolled<N - 1>([&](auto i) INLINED {
    sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(coefficients[N - 2 - i]));
  });
  return sum;
}

// x * normal_cdf(x): the cdf is 1/2 + x P(x^2) / Q(x^2) to 1.3e-8 for |x| < 5.6, fitted to math.erf by
// least squares until the largest error was least; beyond it is 0 or 1 to 1e-8.
ALWAYS_INLINE __m512 gelu(__m512 x) {
  constexpr float p[] = {0.398942267f,    0.0345861419f,  0.00471665541f,
                         0.000175387578f, 6.31098144e-06f, 2.16473383e-08f};
  constexpr float q[] = {1.0f,           0.253360753f,    0.029050977f,
                         0.00192238004f, 7.52855843e-05f, 1.16215684e-06f};
  const __m512 square = _mm512_mul_ps(x, x), half = _mm512_set1_ps(0.5f);
  const __m512 odd = _mm512_div_ps(_mm512_mul_ps(x, polynomial(p, square)), polynomial(q, square));
  const __m512 inside = _mm512_fmadd_ps(x, odd, _mm512_mul_ps(x, half));
  // Unordered is not beyond: a NaN stays.
  const __mmask16 beyond = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(5.6f), _CMP_GT_OQ);
  return _mm512_mask_max_ps(inside, beyond, x, _mm512_setzero_ps());
}

template <Activation kActivation>
ALWAYS_INLINE __m512 activate(__m512 x) {
  if (kActivation == Activation::kGelu) return gelu(x);
  if (kActivation == Activation::kGeluTanh) {  // tanh(u) = 2 sigmoid(2 u) - 1
    const __m512 cubic = _mm512_set1_ps(2 * 0.7978845608f * 0.044715f), linear = _mm512_set1_ps(2 * 0.7978845608f);
    const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(x, x), cubic, linear);
    return times_sigmoid(x, _mm512_mul_ps(x, slope));
  }
  if (kActivation == Activation::kQuickGelu) return times_sigmoid(x, _mm512_mul_ps(x, _mm512_set1_ps(1.702f)));
  if (kActivation == Activation::kRelu) return _mm512_max_ps(_mm512_setzero_ps(), x);  // x where it is NaN
  return x;
}

// f(row, column, mask) for every 16 values.
template <class F>
ALWAYS_INLINE void each(size_t rows, size_t columns, const F& f) {
  for (size_t r = 0; r < rows; ++r) {
    size_t i = 0;
    for (; i + 16 <= columns; i += 16) f(r, i, __mmask16(0xffff));
    if (i < columns) f(r, i, simd::mask(int64_t(columns - i)));
  }
}

template <Activation kActivation>
void finish_with(const Epilogue& epilogue, size_t rows, size_t columns, const float* product, size_t stride,
                 Matrix y) {
  each(rows, columns, [&](size_t r, size_t i, __mmask16 mask) INLINED {
    __m512 v = activate<kActivation>(_mm512_maskz_loadu_ps(mask, product + r * stride + i));
    if (epilogue.factor) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, epilogue.factor + i));
    if (epilogue.residual)
      v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, epilogue.residual + r * y.stride + i));
    _mm512_mask_storeu_ps(y.data + r * y.stride + i, mask, v);
  });
}

}  // namespace

void finish(const Epilogue& epilogue, size_t rows, size_t columns, const float* product, size_t stride, Matrix y) {
  constexpr decltype(&finish_with<Activation::kNone>) kWays[] = {
      finish_with<Activation::kNone>, finish_with<Activation::kGelu>, finish_with<Activation::kGeluTanh>,
      finish_with<Activation::kQuickGelu>, finish_with<Activation::kRelu>};
  kWays[int(epilogue.activation)](epilogue, rows, columns, product, stride, y);
}

void gate(size_t rows, size_t columns, Matrix y, const float* other, size_t stride) {
  each(rows, columns, [&](size_t r, size_t i, __mmask16 mask) INLINED {
    float* at = y.data + r * y.stride + i;
    const __m512 v = _mm512_maskz_loadu_ps(mask, at);
    const __m512 with = _mm512_maskz_loadu_ps(mask, other + r * stride + i);
    _mm512_mask_storeu_ps(at, mask, _mm512_mul_ps(times_sigmoid(v, v), with));
  });
}

}  // namespace vlm_edge
KERNELS_END
