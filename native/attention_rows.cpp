// Attention of few queries in float32: reading the keys and values takes all the time.
//
// Keys are cut into ranges that do not depend on the number of threads; the ranges' results are merged as
// in FlashDecoding: each has its own maximum and sum.

#include <vector>

#include "attention_detail.h"
#include "attention_simd.h"

KERNELS_BEGIN

namespace vlm_edge {
namespace {

using namespace simd;

constexpr int64_t RANGE = 256;  // keys of a work item
constexpr int64_t STEP = 64;    // keys that stay in the first-level cache while all rows use them
constexpr int64_t ALONE_BYTES = 256 << 10;  // less cache than this is read by one thread

// 16 channels, of which `lanes` exist; int8 ones without their scale.
ALWAYS_INLINE __m512 load(__mmask16 lanes, const float* x) { return _mm512_maskz_loadu_ps(lanes, x); }
ALWAYS_INLINE __m512 load(__mmask16 lanes, const int8_t* x) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, x)));
}

// Keys of a register tile; ROWS is 1 to 4.
template <int ROWS>
constexpr int KEYS = ROWS == 3 ? 4 : 16 / ROWS;

// s[r][j] = q[r] . k[j] for ROWS rows and KEYS keys, of which `count` exist.
template <int ROWS, class T>
void dots(const float* q, int64_t padded, const HeadOf<T>& keys, int64_t width, int64_t count, float* s) {
  const T* k[KEYS<ROWS>];
#pragma GCC unroll 16
  for (int j = 0; j < KEYS<ROWS>; ++j) k[j] = keys.data + std::min<int64_t>(j, count - 1) * keys.stride;
  __m512 acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
  for (int64_t c = 0; c < width; c += LANES) {
    const __mmask16 lanes = mask(width - c);
#pragma GCC unroll 16
    for (int j = 0; j < KEYS<ROWS>; ++j) {
      const __m512 key = load(lanes, k[j] + c);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        acc[r * KEYS<ROWS> + j] =
            _mm512_fmadd_ps(key, _mm512_load_ps(q + r * padded + c), acc[r * KEYS<ROWS> + j]);
    }
  }
  const __m512 all = sums(acc);
  if constexpr (ROWS == 1) {
    _mm512_store_ps(s, all);
  } else if constexpr (ROWS == 2) {
    _mm256_store_ps(s, _mm512_castps512_ps256(all));
    _mm256_store_ps(s + RANGE, _mm512_extractf32x8_ps(all, 1));
  } else {
    _mm_store_ps(s, _mm512_castps512_ps128(all));
    _mm_store_ps(s + RANGE, _mm512_extractf32x4_ps(all, 1));
    _mm_store_ps(s + 2 * RANGE, _mm512_extractf32x4_ps(all, 2));
    if constexpr (ROWS == 4) _mm_store_ps(s + 3 * RANGE, _mm512_extractf32x4_ps(all, 3));
  }
}

// o[r] += sum_j p[r][j] v[j] for ROWS rows and 16 * N channels, the last 16 of them masked by `last`.
template <int ROWS, int N, class T>
void mix(const float* p, int64_t count, const T* v, int64_t stride, __mmask16 last, float* o,
         int64_t padded) {
  __m512 acc[ROWS][N];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = _mm512_load_ps(o + r * padded + n * LANES);
  for (int64_t j = 0; j < count; ++j, v += stride) {
    __m512 value[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      value[n] = load(n + 1 < N ? mask(LANES) : last, v + n * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        acc[r][n] = _mm512_fmadd_ps(_mm512_set1_ps(p[r * RANGE + j]), value[n], acc[r][n]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) _mm512_store_ps(o + r * padded + n * LANES, acc[r][n]);
}

template <int ROWS, class T>
void mix(const float* p, int64_t count, const HeadOf<T>& values, int64_t width, float* o, int64_t padded) {
  for (int64_t c = 0; c < width; c += 4 * LANES) {
    const int64_t vectors = std::min<int64_t>(4, (width - c + LANES - 1) / LANES);
    const __mmask16 last = mask(width - c - (vectors - 1) * LANES);
    const T* v = values.data + c;
    if (vectors == 4) mix<ROWS, 4>(p, count, v, values.stride, last, o + c, padded);
    else if (vectors == 3) mix<ROWS, 3>(p, count, v, values.stride, last, o + c, padded);
    else if (vectors == 2) mix<ROWS, 2>(p, count, v, values.stride, last, o + c, padded);
    else mix<ROWS, 1>(p, count, v, values.stride, last, o + c, padded);
  }
}

// Calls body(rows, first row) over rows in groups of 4 and what is left.
template <class F>
void by_rows(int64_t rows, const F& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(std::integral_constant<int, 4>(), r);
  if (rows - r == 3) body(std::integral_constant<int, 3>(), r);
  if (rows - r == 2) body(std::integral_constant<int, 2>(), r);
  if (rows - r == 1) body(std::integral_constant<int, 1>(), r);
}

// What a range of keys gives: not yet divided by the sum.
struct Partial {
  float* o;        // [rows][padded]
  float* maximum;  // [rows]
  float* sum;      // [rows]

  Partial(Arena& arena, int64_t rows, int64_t padded)
      : o(arena.take<float>(rows * padded)), maximum(arena.take<float>(rows)), sum(arena.take<float>(rows)) {}
};

struct Range {
  int64_t b, head, begin, end;  // keys
};

// s[j] *= scales[j], which an int8 cache has.
void rescale(float* s, const float* scales, int64_t count) {
  for (int64_t j = 0; j < count; j += LANES)
    _mm512_store_ps(s + j, _mm512_mul_ps(_mm512_load_ps(s + j), _mm512_maskz_loadu_ps(mask(count - j), scales + j)));
}

// Asks for `count` rows ahead of their use: a range is too short for the hardware to guess well, and at its
// values it starts anew.
template <class T>
void prefetch(const HeadOf<T>& rows, int64_t count, int64_t width) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t j = 0; j < count; ++j)
    for (int64_t c = 0; c < width; c += LINE)
      _mm_prefetch(reinterpret_cast<const char*>(rows.data + j * rows.stride + c), _MM_HINT_T0);
}

template <class T>
void range(const Problem& problem, const Range& keys_range, int64_t padded, const Partial& out) {
  static thread_local Buffer buffer;
  const int64_t rows = problem.rows(), width = problem.shape.head_dim, group = problem.group();
  const int64_t b = keys_range.b, head = keys_range.head, begin = keys_range.begin;
  const int64_t count = keys_range.end - begin;
  Arena measure(nullptr);
  measure.take<float>(rows * padded);
  measure.take<float>(rows * RANGE);
  Arena arena(buffer.get(measure.used()));
  float* q = arena.take<float>(rows * padded);
  float* s = arena.take<float>(rows * RANGE);

  write_cache(problem, b, head, begin, keys_range.end);
  const HeadOf<T> keys = keys_of<T>(problem, b, head, begin), values = values_of<T>(problem, b, head, begin);
  for (int64_t r = 0; r < rows; ++r) {
    rotate(problem, b, r / group, problem.q + problem.row_offset(b, head, r), problem.shape.scale * LOG2E,
           q + r * padded);
    std::fill(q + r * padded + width, q + (r + 1) * padded, 0.0f);
  }

  for (int64_t step = 0; step < count; step += STEP) {
    const int64_t now = std::min(STEP, count - step);
    by_rows(rows, [&](auto n, int64_t r) {
      constexpr int ROWS = decltype(n)::value;
      for (int64_t j = step; j < step + now; j += KEYS<ROWS>) {
        if (r == 0) {
          prefetch(keys.from(j + STEP), std::min<int64_t>(KEYS<ROWS>, count - j - STEP), width);
          prefetch(values.from(j), std::min<int64_t>(KEYS<ROWS>, count - j), width);
        }
        dots<ROWS>(q + r * padded, padded, keys.from(j), width, count - j, s + r * RANGE + j);
      }
    });
  }

  const int64_t vectors = (count + LANES - 1) / LANES;
  for (int64_t r = 0; r < rows; ++r) {
    float* each = s + r * RANGE;
    if (keys.scales) rescale(each, keys.scales, count);
    hide(each, vectors, problem.first_key(b, r / group) - begin, problem.end_key(b, r / group) - begin);
    __m512 top = _mm512_set1_ps(LOWEST), total = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; ++v) top = _mm512_max_ps(top, _mm512_load_ps(each + v * LANES));
    const float maximum = _mm512_reduce_max_ps(top);
    for (int64_t v = 0; v < vectors; ++v) {
      const __m512 weight = exp2(_mm512_sub_ps(_mm512_load_ps(each + v * LANES), _mm512_set1_ps(maximum)));
      total = _mm512_add_ps(total, weight);
      _mm512_store_ps(each + v * LANES, weight);
    }
    out.maximum[r] = maximum;
    out.sum[r] = _mm512_reduce_add_ps(total);
    if (values.scales) rescale(each, values.scales, count);
  }

  std::fill(out.o, out.o + rows * padded, 0.0f);
  for (int64_t step = 0; step < count; step += STEP) {
    const int64_t now = std::min(STEP, count - step);
    by_rows(rows, [&](auto n, int64_t r) {
      constexpr int ROWS = decltype(n)::value;
      mix<ROWS>(s + r * RANGE + step, now, values.from(step), width, out.o + r * padded, padded);
    });
  }
}

// Outputs of one head from its ranges' results.
void merge(const Problem& problem, const Range& head, const Partial* parts, int64_t count, int64_t padded) {
  const int64_t width = problem.shape.head_dim;
  for (int64_t r = 0; r < problem.rows(); ++r) {
    float maximum = LOWEST, sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) maximum = std::max(maximum, parts[i].maximum[r]);
    for (int64_t i = 0; i < count; ++i) sum += parts[i].sum[r] * exp2(parts[i].maximum[r] - maximum);
    float* y = problem.y + problem.row_offset(head.b, head.head, r);
    for (int64_t c = 0; c < width; c += LANES) {
      __m512 o = _mm512_setzero_ps();
      for (int64_t i = 0; i < count; ++i)
        o = _mm512_fmadd_ps(_mm512_set1_ps(exp2(parts[i].maximum[r] - maximum) / sum),
                            _mm512_load_ps(parts[i].o + r * padded + c), o);
      _mm512_mask_storeu_ps(y + c, mask(width - c), o);
    }
  }
}

}  // namespace

void attention_rows(const Problem& problem, const ParallelFor& parallel) {
  static thread_local Buffer buffer;
  const auto& shape = problem.shape;
  const int64_t rows = problem.rows(), padded = round_up(shape.head_dim, LANES);
  std::vector<Range> ranges;
  int64_t keys = 0;
  for (int64_t i = 0; i < shape.batch * shape.kv_heads; ++i) {
    const int64_t b = i / shape.kv_heads, end = problem.end_key(b, shape.queries - 1);
    for (int64_t at = problem.first_key(b, 0); at < end; at += RANGE)
      ranges.push_back({b, i % shape.kv_heads, at, std::min(at + RANGE, end)});
    keys += end - problem.first_key(b, 0);
  }
  Arena measure(nullptr);
  for (size_t i = 0; i < ranges.size(); ++i) Partial(measure, rows, padded);
  Arena arena(buffer.get(measure.used()));
  std::vector<Partial> partials;
  for (size_t i = 0; i < ranges.size(); ++i) partials.emplace_back(arena, rows, padded);

  const bool rounded = problem.cache && !problem.cache->keys.floats;
  const auto item = [&](int64_t i) {
    if (rounded) range<int8_t>(problem, ranges[i], padded, partials[i]);
    else range<float>(problem, ranges[i], padded, partials[i]);
  };
  if (keys * shape.head_dim * 2 * static_cast<int64_t>(sizeof(float)) < ALONE_BYTES)
    for (size_t i = 0; i < ranges.size(); ++i) item(i);
  else
    balanced(parallel, ranges.size(), item);
  for (size_t first = 0, end; first < ranges.size(); first = end) {
    for (end = first; end < ranges.size() && ranges[end].head == ranges[first].head &&
                      ranges[end].b == ranges[first].b;)
      ++end;
    merge(problem, ranges[first], &partials[first], end - first, padded);
  }
}

}  // namespace vlm_edge

KERNELS_END
