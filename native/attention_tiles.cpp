// Attention of many queries: tiles of keys in bfloat16, softmax in float32 with a running maximum and sum.
//
// Keys and values are packed once per key-value head: pairs of bfloat16 in the order in which dpbf16ps
// reads them. Then blocks of rows go over the tiles they see; masked tiles are never touched.
//
// Scores can be large, and bfloat16 keeps 8 bits. What all keys of a tile have in common adds the same to
// all its scores, so each tile stores its keys less their mean, and the mean's score is added in float32.

#include <cmath>
#include <cstring>
#include <vector>

#include "attention_detail.h"
#include "attention_simd.h"

KERNELS_BEGIN

namespace vlm_edge {
namespace {

using namespace simd;

constexpr int ROWS = 6;            // rows of a register tile: 6 x 4 sums, 4 keys' vectors, 1 query
constexpr int64_t CHUNK = 64;      // keys of a register tile
constexpr int64_t TILE = 512;      // keys between two looks at the maximum
constexpr int64_t BLOCK = 16 * ROWS;  // rows of a work item
constexpr int64_t PACKED_BYTES = 8 << 20;  // packed at a time
constexpr int64_t AHEAD = 16;  // keys or values between what is packed and what is fetched: strides hide them

// Sizes of one head's packed form, in words of 32 bits (a pair of bfloat16, or a float).
struct Layout {
  int64_t width, pairs, padded;

  explicit Layout(int64_t head_dim)
      : width(head_dim), pairs((head_dim + 1) / 2), padded(round_up(head_dim, LANES)) {}
  // [TILE / CHUNK][pairs][CHUNK]: word = channels 2 p, 2 p + 1 of a key.
  int64_t key_tile() const { return pairs * TILE; }
  // [TILE / 2][padded]: word = a channel of values 2 j, 2 j + 1.
  int64_t value_tile() const { return TILE / 2 * padded; }
};

// The packed keys and values of one head, tiles first .. end - 1.
struct Packed {
  int64_t b, head, first, end;
  uint32_t* keys;    // [tiles][key_tile]
  uint32_t* values;  // [tiles][value_tile]
  float* means;      // [tiles / 16][width][16]

  int64_t tiles() const { return end - first; }
  int64_t mean_tiles() const { return round_up(tiles(), LANES); }
};

// Keys first .. count - 1 of a tile; their chunk's earlier ones are packed too, but have no part in the mean.
void pack_keys(const Head& head, int64_t first, int64_t count, const Layout& layout, uint32_t* out,
               float* mean) {
  const int64_t width = layout.width;
  for (int64_t c = 0; c < width; c += LANES) {
    const __mmask16 lanes = mask(width - c);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = first; j < count; ++j) {
      _mm_prefetch(head.data + (j + AHEAD) * head.stride + c, _MM_HINT_T0);
      sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, head.data + j * head.stride + c));
    }
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(1.0f / (count - first)));
    // A NaN or infinity stays with its own key.
    sum = _mm512_maskz_mov_ps(_mm512_knot(_mm512_fpclass_ps_mask(sum, 0x99)), sum);
    alignas(64) float sums[LANES];
    _mm512_store_ps(sums, sum);
    for (int64_t i = 0; i < std::min(LANES, width - c); ++i) mean[(c + i) * LANES] = sums[i];
  }
  const __m512i every = _mm512_mullo_epi32(_mm512_set1_epi32(LANES), _mm512_set_epi32(
      15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (int64_t c = 0; c < width; c += 2 * LANES) {
    const __mmask16 low = mask(width - c), high = mask(width - c - LANES);
    const __m512 mean_low = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), low, every, mean + c * LANES, 4);
    const __m512 mean_high = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), high, every,
                                                      mean + (c + LANES) * LANES, 4);
    for (int64_t j = first / CHUNK * CHUNK; j < count; j += LANES) {
      uint32_t* to = out + j / CHUNK * CHUNK * layout.pairs + j % CHUNK;
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        r[i] = _mm512_setzero_si512();
        if (j + i < count) {
          const float* key = head.data + (j + i) * head.stride + c;
          r[i] = (__m512i)_mm512_cvtne2ps_pbh(
              _mm512_sub_ps(_mm512_maskz_loadu_ps(high, key + LANES), mean_high),
              _mm512_sub_ps(_mm512_maskz_loadu_ps(low, key), mean_low));
        }
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (c / 2 + i < layout.pairs) _mm512_store_si512(to + (c / 2 + i) * CHUNK, r[i]);
    }
  }
}

void pack_values(const Head& head, int64_t first, int64_t count, const Layout& layout, uint32_t* out) {
  // [16 of value 2 j | 16 of value 2 j + 1] -> pairs
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  const __m512i pairs = _mm512_load_si512(order);
  for (int64_t j = first / CHUNK * CHUNK; j < count; j += 2) {
    const float* first = head.data + j * head.stride;
    for (int64_t c = 0; c < layout.padded; c += LANES) {
      const __mmask16 lanes = mask(layout.width - c), second = j + 1 < count ? lanes : 0;
      _mm_prefetch(first + AHEAD * head.stride + c, _MM_HINT_T0);
      _mm_prefetch(first + (AHEAD + 1) * head.stride + c, _MM_HINT_T0);
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(second, first + head.stride + c),
                                                _mm512_maskz_loadu_ps(lanes, first + c));
      _mm512_store_si512(out + j / 2 * layout.padded + c, _mm512_permutexvar_epi16(pairs, (__m512i)both));
    }
  }
}

void pack_tile(const Problem& problem, const Packed& packed, const Layout& layout, int64_t tile) {
  const int64_t b = packed.b, begin = tile * TILE;
  const int64_t end = std::min(begin + TILE, problem.end_key(b, problem.shape.queries - 1));
  const int64_t first = std::max<int64_t>(0, problem.first_key(b, 0) - begin);  // that any query sees
  const int64_t count = end - begin, at = tile - packed.first;
  write_cache(problem, b, packed.head, begin, end);
  Head keys, values;
  if (problem.cache && !problem.cache->keys.floats) {
    static thread_local Buffer buffer;
    const int64_t size = TILE * layout.width;
    float* scratch = reinterpret_cast<float*>(buffer.get(2 * size * sizeof(float)));
    keys = {scratch, layout.width}, values = {scratch + size, layout.width};
    dequantize(keys_of<int8_t>(problem, b, packed.head, begin), count, layout.width, scratch);
    dequantize(values_of<int8_t>(problem, b, packed.head, begin), count, layout.width, scratch + size);
  } else {
    keys = keys_of<float>(problem, b, packed.head, begin);
    values = values_of<float>(problem, b, packed.head, begin);
  }
  pack_keys(keys, first, count, layout, packed.keys + at * layout.key_tile(),
            packed.means + at / LANES * LANES * layout.width + at % LANES);
  pack_values(values, first, count, layout, packed.values + at * layout.value_tile());
}

// s[r][n] = q[r] . k[n], for 16 * N keys of a chunk; top[r] is the largest of each lane so far.
template <int N>
void scores(const uint32_t* q, const uint32_t* k, int64_t pairs, float* s, __m512* top) {
  __m512 acc[ROWS][N];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh key[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) key[n] = (__m512bh)_mm512_load_si512(k + p * CHUNK + n * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh query = (__m512bh)_mm512_set1_epi32(q[r * pairs + p]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], query, key[n]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    __m512 most = top[r];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      _mm512_store_ps(s + r * TILE + n * LANES, acc[r][n]);
      most = _mm512_max_ps(most, acc[r][n]);
    }
    top[r] = most;
  }
}

// o[r] = o[r] * factor[r] + sum_j p[r][j] v[j], for 16 * N channels.
template <int N>
void mix(const uint32_t* p, int64_t pairs, const uint32_t* v, int64_t padded, const float* factor, float* o) {
  __m512 acc[ROWS][N];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      acc[r][n] = _mm512_mul_ps(_mm512_load_ps(o + r * padded + n * LANES), _mm512_set1_ps(factor[r]));
  for (int64_t j = 0; j < pairs; ++j) {
    __m512bh value[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) value[n] = (__m512bh)_mm512_load_si512(v + j * padded + n * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(p[r * (TILE / 2) + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], weight, value[n]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) _mm512_store_ps(o + r * padded + n * LANES, acc[r][n]);
}

void scores(int64_t vectors, const uint32_t* q, const uint32_t* k, int64_t pairs, float* s, __m512* top) {
  for (int r = 0; r < ROWS; ++r) top[r] = _mm512_set1_ps(LOWEST);
  for (; vectors > 0; vectors -= 4, k += CHUNK * pairs, s += CHUNK) {
    if (vectors >= 4) scores<4>(q, k, pairs, s, top);
    else if (vectors == 3) scores<3>(q, k, pairs, s, top);
    else if (vectors == 2) scores<2>(q, k, pairs, s, top);
    else scores<1>(q, k, pairs, s, top);
  }
}

void mix(const uint32_t* p, int64_t pairs, const uint32_t* v, int64_t padded, const float* factor, float* o) {
  const int64_t vectors = padded / LANES, parts = (vectors + 3) / 4;
  for (int64_t part = 0, at = 0; part < parts; ++part) {  // even parts: 5 vectors are 3 + 2
    const int64_t n = (vectors - at + parts - part - 1) / (parts - part);
    const uint32_t* from = v + at * LANES;
    float* to = o + at * LANES;
    if (n == 4) mix<4>(p, pairs, from, padded, factor, to);
    else if (n == 3) mix<3>(p, pairs, from, padded, factor, to);
    else if (n == 2) mix<2>(p, pairs, from, padded, factor, to);
    else mix<1>(p, pairs, from, padded, factor, to);
    at += n;
  }
}

// 2^x for x <= 0 to 1.1e-4 (relative), finer than the bfloat16 that it becomes; 0 up to -127, NaN for a NaN
// whose last 9 bits are zeros. In half the time of exp2(): n = round(x) comes by adding a number whose last
// bit is worth 1, and goes into the exponent as an integer. p is fitted to 2^(x - n) as in exp2().
inline __m512 coarse_exp2(__m512 x) {
  const __m512 integers = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23
  x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);         // the second operand where it is NaN
  const __m512 t = _mm512_add_ps(x, integers);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(t, integers));
  __m512 p = _mm512_set1_ps(0.055008946f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.242211168f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693282948f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), n));
}

// One row of a tile: s -> weights 2^(s + common - maximum) in bfloat16. Updates the running maximum and
// sum; returns what earlier sums are to be multiplied with.
float softmax(const float* s, int64_t vectors, float top, float common, uint16_t* p, float& maximum,
              float& sum) {
  const float high = std::max(maximum, top + common);
  const float factor = exp2(maximum - high), less = common - high;
  const __m512 shift = _mm512_set1_ps(std::isnan(less) ? __builtin_nanf("") : less);
  __m512 total = _mm512_setzero_ps();
  for (int64_t v = 0; v < vectors; ++v) {
    const __m512 weight = coarse_exp2(_mm512_add_ps(_mm512_load_ps(s + v * LANES), shift));
    total = _mm512_add_ps(total, weight);
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + v * LANES), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  maximum = high;
  sum = sum * factor + _mm512_reduce_add_ps(total);
  return factor;
}

// What a block of rows carries along.
struct Rows {
  uint32_t* q;     // [BLOCK][pairs]
  float* common;   // [BLOCK][mean_tiles]: scores of the tiles' means
  float* o;        // [BLOCK][padded]
  float* maximum;  // [BLOCK]
  float* sum;      // [BLOCK]
  float* plain;    // [ROWS][padded]: queries in float32
  float* s;        // [ROWS][TILE]
  uint32_t* p;     // [ROWS][TILE / 2]

  Rows(Arena& arena, const Layout& layout, int64_t mean_tiles)
      : q(arena.take<uint32_t>(BLOCK * layout.pairs)),
        common(arena.take<float>(BLOCK * mean_tiles)),
        o(arena.take<float>(BLOCK * layout.padded)),
        maximum(arena.take<float>(BLOCK)),
        sum(arena.take<float>(BLOCK)),
        plain(arena.take<float>(ROWS * layout.padded)),
        s(arena.take<float>(ROWS * TILE)),
        p(arena.take<uint32_t>(ROWS * TILE / 2)) {}
};

// Queries first .. first + ROWS - 1, or the last one again, into the strip that begins at r.
void load_queries(const Problem& problem, const Packed& packed, const Layout& layout, int64_t first,
                  int64_t last, const Rows& rows, int64_t r) {
  const float scale = problem.shape.scale * LOG2E;
  const auto query = [&](int64_t row) {
    return problem.q + problem.row_offset(packed.b, packed.head, std::min(row, last));
  };
  for (int64_t i = 0; i < ROWS; ++i) {
    const int64_t row = std::min(first + i, last);
    const float *in = query(row), *next = query(row + 2 * ROWS);  // strides hide it from the hardware
    for (int64_t c = 0; c < layout.width; c += LANES) _mm_prefetch(next + c, _MM_HINT_T0);
    float* plain = rows.plain + i * layout.padded;
    rotate(problem, packed.b, row / problem.group(), in, scale, plain);
    auto* q = reinterpret_cast<uint16_t*>(rows.q + (r + i) * layout.pairs);
    for (int64_t c = 0; c < 2 * layout.pairs; c += LANES) {
      const __m512 x = _mm512_maskz_loadu_ps(mask(layout.width - c), plain + c);
      _mm256_mask_storeu_epi16(q + c, mask(2 * layout.pairs - c), (__m256i)_mm512_cvtneps_pbh(x));
    }
  }
  for (int64_t t = 0; t < packed.mean_tiles(); t += LANES) {
    __m512 sum[ROWS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) sum[i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < layout.width; ++c) {
      const __m512 mean = _mm512_load_ps(packed.means + t * layout.width + c * LANES);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i)
        sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(rows.plain[i * layout.padded + c]), mean, sum[i]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) _mm512_store_ps(rows.common + (r + i) * packed.mean_tiles() + t, sum[i]);
  }
}

// Rows first .. end - 1 of a head, from queries to outputs.
void block(const Problem& problem, const Packed& packed, const Layout& layout, int64_t first, int64_t end) {
  static thread_local Buffer buffer;
  Arena measure(nullptr);
  Rows(measure, layout, packed.mean_tiles());
  Arena arena(buffer.get(measure.used()));
  const Rows rows(arena, layout, packed.mean_tiles());
  const int64_t group = problem.group(), b = packed.b, strips = (end - first + ROWS - 1) / ROWS;
  const auto query = [&](int64_t row) { return std::min(row, end - 1) / group; };

  for (int64_t r = 0; r < strips * ROWS; r += ROWS)
    load_queries(problem, packed, layout, first + r, end - 1, rows, r);
  std::fill(rows.maximum, rows.maximum + BLOCK, LOWEST);
  std::fill(rows.sum, rows.sum + BLOCK, 0.0f);
  std::memset(rows.o, 0, strips * ROWS * layout.padded * sizeof(float));

  const int64_t last_tile = (problem.end_key(b, query(end - 1)) - 1) / TILE;
  for (int64_t tile = problem.first_key(b, query(first)) / TILE; tile <= last_tile; ++tile) {
    const int64_t begin = tile * TILE, at = tile - packed.first;
    for (int64_t r = 0; r < strips * ROWS; r += ROWS) {
      const int64_t top = query(first + r), bottom = query(first + r + ROWS - 1);
      const int64_t keys = std::min(TILE, problem.end_key(b, bottom) - begin);
      if (keys <= 0 || problem.first_key(b, top) >= begin + TILE) continue;
      // A window may begin within the tile: its chunks before that are not touched.
      const int64_t skipped = std::max<int64_t>(0, problem.first_key(b, top) - begin) / CHUNK * CHUNK;
      const int64_t vectors = (keys - skipped + LANES - 1) / LANES, from = begin + skipped;
      __m512 tops[ROWS];
      scores(vectors, rows.q + r * layout.pairs,
             packed.keys + at * layout.key_tile() + skipped * layout.pairs, layout.pairs, rows.s, tops);
      if (problem.end_key(b, top) < from + vectors * LANES || problem.first_key(b, bottom) > from)
        for (int64_t i = 0; i < ROWS; ++i) {
          const int64_t each = query(first + r + i);
          tops[i] = hide(rows.s + i * TILE, vectors, problem.first_key(b, each) - from,
                         problem.end_key(b, each) - from);
        }
      float factor[ROWS];
      for (int64_t i = 0; i < ROWS; ++i)
        factor[i] = softmax(rows.s + i * TILE, vectors, _mm512_reduce_max_ps(tops[i]),
                            rows.common[(r + i) * packed.mean_tiles() + at],
                            reinterpret_cast<uint16_t*>(rows.p + i * (TILE / 2)), rows.maximum[r + i],
                            rows.sum[r + i]);
      mix(rows.p, (keys - skipped + 1) / 2,
          packed.values + at * layout.value_tile() + skipped / 2 * layout.padded, layout.padded, factor,
          rows.o + r * layout.padded);
    }
  }

  for (int64_t row = first; row < end; ++row) {
    const float* o = rows.o + (row - first) * layout.padded;
    float* y = problem.y + problem.row_offset(b, packed.head, row);
    const __m512 share = _mm512_set1_ps(1.0f / rows.sum[row - first]);
    for (int64_t c = 0; c < layout.width; c += LANES)
      _mm512_mask_storeu_ps(y + c, mask(layout.width - c), _mm512_mul_ps(_mm512_load_ps(o + c), share));
  }
}

}  // namespace

void attention_tiles(const Problem& problem, const ParallelFor& parallel) {
  static thread_local Buffer buffer;
  const auto& shape = problem.shape;
  const Layout layout(shape.head_dim);
  const int64_t heads = shape.batch * shape.kv_heads, rows = problem.rows();
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;

  for (int64_t begin = 0; begin < heads;) {  // as many heads as fit PACKED_BYTES
    std::vector<Packed> packed;
    Arena measure(nullptr);
    int64_t tiles = 0;
    for (; begin < heads && (packed.empty() || measure.used() < PACKED_BYTES); ++begin) {
      Packed each{begin / shape.kv_heads, begin % shape.kv_heads, 0, 0, nullptr, nullptr, nullptr};
      each.first = problem.first_key(each.b, 0) / TILE;
      each.end = (problem.end_key(each.b, shape.queries - 1) + TILE - 1) / TILE;
      measure.take<uint32_t>(each.tiles() * layout.key_tile());
      measure.take<uint32_t>(each.tiles() * layout.value_tile());
      measure.take<float>(each.mean_tiles() * layout.width);
      tiles = std::max(tiles, each.tiles());
      packed.push_back(each);
    }
    Arena arena(buffer.get(measure.used()));
    for (Packed& each : packed) {
      each.keys = arena.take<uint32_t>(each.tiles() * layout.key_tile());
      each.values = arena.take<uint32_t>(each.tiles() * layout.value_tile());
      each.means = arena.take<float>(each.mean_tiles() * layout.width);
    }
    balanced(parallel, packed.size() * tiles, [&](int64_t i) {
      const Packed& each = packed[i / tiles];
      const int64_t tile = each.first + i % tiles;
      if (tile < each.end) pack_tile(problem, each, layout, tile);
    });
    // A head's last rows first: they see the most.
    balanced(parallel, packed.size() * blocks, [&](int64_t i) {
      const int64_t first = (blocks - 1 - i % blocks) * BLOCK;
      block(problem, packed[i / blocks], layout, first, std::min(first + BLOCK, rows));
    });
  }
}

}  // namespace vlm_edge

KERNELS_END
