// y = x @ W for up to four rows of x, each weight read once: bound by memory.

#include "isa.h"
#include "linear.h"
#include "weights.h"

KERNELS_BEGIN
namespace vlm_edge {
namespace {

constexpr size_t kRows = 128;      // of W in a tile, as many as the hardware can have in flight
constexpr size_t kAhead = 8192;   // bytes of weights between what is computed and what is fetched

// Up to kRows rows of 64 columns of W, for M rows of x.
//
//   w, fetch: first row of this tile and of the one to fetch, `stride` bytes from row to row
//   q: first row of x, `q_stride` bytes from row to row
template <class Weights, size_t M, class... Mask>
ALWAYS_INLINE void tile(const uint8_t* w, const uint8_t* fetch, size_t stride, size_t rows, const int8_t* q,
                        size_t q_stride, __m512i acc[M][4], Mask... mask) {
  for (size_t r = 0; r < rows; r += 4) {
    size_t last = rows - 1 - r;  // where rows end within the four, q has zeros and any weight will do
    const uint8_t* w0 = w + r * stride;
    const uint8_t* f0 = fetch + r * stride;
    unrolled<4>([&](auto i) INLINED { _mm_prefetch(f0 + i * stride, _MM_HINT_T0); });
    __m512i v[4];
    interleave(Weights::row(w0, mask...), Weights::row(w0 + std::min<size_t>(1, last) * stride, mask...),
               Weights::row(w0 + std::min<size_t>(2, last) * stride, mask...),
               Weights::row(w0 + std::min<size_t>(3, last) * stride, mask...), v);
    unrolled<M>([&](auto m) INLINED {
      int32_t four;
      __builtin_memcpy(&four, q + m * q_stride + r, 4);
      __m512i x = _mm512_set1_epi32(four);
      unrolled<4>([&](auto i) INLINED { acc[m][i] = _mm512_dpbusd_epi32(acc[m][i], v[i], x); });
    });
  }
}

// y[m, 0..63] (+)= x_scale * w_scale * acc; the first block begins with the bias.
ALWAYS_INLINE void add_to(float* y, __m512i acc[4], float x_scale, const float* w_scale, const float* bias,
                          bool first, __mmask64 mask) {
  in_order(acc);
  unrolled<4>([&](auto i) INLINED {
    __mmask16 columns = __mmask16(mask >> 16 * i);
    __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i]), _mm512_set1_ps(x_scale));
    __m512 scale = _mm512_maskz_loadu_ps(columns, w_scale + 16 * i);
    __m512 before = !first ? _mm512_maskz_loadu_ps(columns, y + 16 * i)
                    : bias ? _mm512_maskz_loadu_ps(columns, bias + 16 * i)
                           : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(y + 16 * i, columns, _mm512_fmadd_ps(sum, scale, before));
  });
}

// `part` of M rows; the first column of y is the part's.
template <class Weights, size_t M>
void stripe(const Linear& layer, const Quantized& x, const Part& part, Matrix y) {
  const Blocks& blocks = x.blocks;
  const size_t begin = part.column, end = begin + part.columns;
  const size_t stride = Weights::bytes(layer.n), groups = (end - begin + kColumns - 1) / kColumns;
  const size_t group_bytes = Weights::bytes(kColumns);
  const uint8_t* corner = layer.weight + Weights::bytes(begin);
  alignas(64) int32_t sums[M][kStripe];  // of a block longer than a tile
  for (size_t b = 0; b < blocks.count; ++b) {
    const float* w_scale = layer.scale + (blocks.scaled ? b * layer.n : 0);
    for (size_t top = 0, rows = blocks.rows(b); top < rows; top += kRows) {
      const uint8_t* w = corner + (b * blocks.size + top) * stride;
      const int8_t* q = x.q.get() + part.row * blocks.row_bytes() + b * blocks.padded + top;
      const size_t here = std::min(kRows, rows - top);
      const bool starts = top == 0, ends = top + here == rows;
      const size_t ahead = kAhead / (here * group_bytes);  // tiles
      for (size_t g = 0; g < groups; ++g) {
        const size_t column = begin + g * kColumns;
        const __mmask64 mask = columns_mask(end - column);
        // Tiles follow each other along the stripe, then downwards. Fetching past the end is harmless.
        const size_t down = (g + ahead) / groups, along = (g + ahead) % groups;
        const uint8_t* fetch = w + down * here * stride + along * group_bytes;
        __m512i acc[M][4];
        unrolled<M>([&](auto m) INLINED {
          unrolled<4>([&](auto i) INLINED {
            acc[m][i] = starts ? _mm512_set1_epi32(-Weights::kOffset * x.sum.get()[(part.row + m) * blocks.count + b])
                               : _mm512_load_si512(&sums[m][g * kColumns + 16 * i]);
          });
        });
        if (mask == ~0ull) {
          tile<Weights, M>(w + g * group_bytes, fetch, stride, here, q, blocks.row_bytes(), acc);
        } else {
          tile<Weights, M>(w + g * group_bytes, fetch, stride, here, q, blocks.row_bytes(), acc, mask);
        }
        if (blocks.scaled) {
          const float* scales = w_scale + down * layer.n + begin + along * kColumns;
          for (size_t i = 0; i < kColumns; i += 16) _mm_prefetch(scales + i, _MM_HINT_T0);
        }
        unrolled<M>([&](auto m) INLINED {
          if (ends) {
            float x_scale = x.scale.get()[(part.row + m) * blocks.scales() + (blocks.scaled ? b : 0)];
            add_to(y.data + m * y.stride + g * kColumns, acc[m], x_scale, w_scale + column,
                   layer.bias ? layer.bias + column : nullptr, b == 0, mask);
          } else {
            unrolled<4>([&](auto i) INLINED {
              _mm512_store_si512(&sums[m][g * kColumns + 16 * i], acc[m][i]);
            });
          }
        });
      }
    }
  }
}

template <class Weights>
void stripe_of(const Linear& layer, const Quantized& x, const Part& part, Matrix y) {
  switch (part.rows) {
    case 1: return stripe<Weights, 1>(layer, x, part, y);
    case 2: return stripe<Weights, 2>(layer, x, part, y);
    case 3: return stripe<Weights, 3>(layer, x, part, y);
    default: return stripe<Weights, 4>(layer, x, part, y);
  }
}

}  // namespace

void gemv(const Linear& layer, const Quantized& x, const Part& part, const Epilogue& epilogue, Matrix y) {
  const bool int8 = layer.format == WeightFormat::kInt8;
  (int8 ? stripe_of<Int8Weights> : stripe_of<Int4Weights>)(layer, x, part, y);
  if (!epilogue.empty()) finish(epilogue, part.rows, part.columns, y.data, y.stride, y);
}

}  // namespace vlm_edge
KERNELS_END
