// y = x @ W for many rows of x: 64 columns of W are packed, then met by six rows of x at a time.

#include "isa.h"
#include "linear.h"
#include "weights.h"

KERNELS_BEGIN
namespace vlm_edge {
namespace {

constexpr size_t kRows = 6;      // of x at a time: 6 x 4 sums, 4 weights and a broadcast in 32 registers
constexpr size_t kAhead = 64;    // rows of W between what is packed and what is fetched

// sum += products of four unsigned with four signed bytes. With the intrinsic GCC 12 keeps two copies
// of each sum, which do not fit into the registers, and is less than half as fast.
ALWAYS_INLINE void add_products(__m512i& sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

// Columns [column, column + 64) of W as [k / 4][column][4 of k], columns in order, blocks padded.
template <class Weights>
void pack(const Linear& layer, const Blocks& blocks, size_t column, __mmask64 mask, uint8_t* panel) {
  const size_t stride = Weights::bytes(layer.n);
  for (size_t b = 0; b < blocks.count; ++b) {
    const uint8_t* w = layer.weight + b * blocks.size * stride + Weights::bytes(column);
    const size_t rows = blocks.rows(b);
    for (size_t r = 0; r < blocks.padded; r += 4, panel += 256) {
      // Past the last row x has zeros, and any weight will do.
      auto row = [&](size_t i) { return Weights::row(w + std::min(r + i, rows - 1) * stride, mask); };
      // Strides hide the rows from the hardware. Fetching past the end is harmless.
      unrolled<4>([&](auto i) INLINED { _mm_prefetch(w + (r + kAhead + i) * stride, _MM_HINT_T0); });
      __m512i v[4];
      interleave(row(0), row(1), row(2), row(3), v);
      in_order(v);
      unrolled<4>([&](auto i) INLINED { _mm512_store_si512(panel + 64 * i, v[i]); });
    }
  }
}

// Columns of W as they are met by every row.
struct Panel {
  Scratch<uint8_t> weights;  // what pack() makes
  Scratch<float> scale;      // [blocks or 1][kColumns], zeros where there is no column
  alignas(64) float bias[kColumns];
  int offset;

  Panel(const Linear& layer, const Blocks& blocks, size_t column, __mmask64 mask)
      : weights(blocks.row_bytes() * kColumns), scale(blocks.scales() * kColumns) {
    const bool int8 = layer.format == WeightFormat::kInt8;
    offset = int8 ? Int8Weights::kOffset : Int4Weights::kOffset;
    (int8 ? pack<Int8Weights> : pack<Int4Weights>)(layer, blocks, column, mask, weights.get());
    for (size_t i = 0; i < kColumns; i += 16) {
      const __mmask16 exist = __mmask16(mask >> i);
      for (size_t b = 0; b < blocks.scales(); ++b)
        _mm512_store_ps(scale.get() + b * kColumns + i,
                        _mm512_maskz_loadu_ps(exist, layer.scale + b * layer.n + column + i));
      const float* from = layer.bias + column + i;
      _mm512_store_ps(bias + i, layer.bias ? _mm512_maskz_loadu_ps(exist, from) : _mm512_setzero_ps());
    }
  }
};

// `rows` rows of a tile of y or of the residual, which the multiplication leaves time to fetch.
void fetch(const float* data, size_t stride, size_t rows) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < kColumns; i += 16) _mm_prefetch(data + r * stride + i, _MM_HINT_T0);
}

// M rows of x, from `row`, against a panel.
template <size_t M>
void multiply(const Panel& panel, const Quantized& x, size_t row, float* tile) {
  const Blocks& blocks = x.blocks;
  const size_t q_stride = blocks.row_bytes(), scales = blocks.scales();
  const uint8_t* weights = panel.weights.get();
  const int8_t* q = x.q.get() + row * q_stride;
  const int32_t* sum = x.sum.get() + row * blocks.count;
  const float* before = panel.bias;
  size_t before_stride = 0;
  for (size_t b = 0; b < blocks.count; ++b, q += blocks.padded) {
    __m512i acc[M][4];
    unrolled<M>([&](auto m) INLINED {
      __m512i start = _mm512_set1_epi32(-panel.offset * sum[m * blocks.count + b]);
      unrolled<4>([&](auto i) INLINED { acc[m][i] = start; });
    });
    for (size_t r = 0; r < blocks.padded; r += 4, weights += 256) {
      __m512i w[4];
      unrolled<4>([&](auto i) INLINED { w[i] = _mm512_load_si512(weights + 64 * i); });
      // The next rows: strides hide them from the hardware.
      if (r % 64 == 0) {
        unrolled<M>([&](auto m) INLINED { _mm_prefetch(q + (M + m) * q_stride + r, _MM_HINT_T0); });
      }
      unrolled<M>([&](auto m) INLINED {
        int32_t four;
        __builtin_memcpy(&four, q + m * q_stride + r, 4);
        __m512i v = _mm512_set1_epi32(four);
        unrolled<4>([&](auto i) INLINED { add_products(acc[m][i], w[i], v); });
      });
    }
    const size_t which = blocks.scaled ? b : 0;
    const float* x_scale = x.scale.get() + row * scales + which;
    const float* w_scale = panel.scale.get() + which * kColumns;
    unrolled<M>([&](auto m) INLINED {
      const __m512 factor = _mm512_set1_ps(x_scale[m * scales]);
      unrolled<4>([&](auto i) INLINED {
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[m][i]), factor);
        value = _mm512_fmadd_ps(value, _mm512_load_ps(w_scale + 16 * i),
                                _mm512_load_ps(before + m * before_stride + 16 * i));
        _mm512_store_ps(tile + m * kColumns + 16 * i, value);
      });
    });
    before = tile;
    before_stride = kColumns;
  }
}

using Multiply = void (*)(const Panel&, const Quantized&, size_t, float*);
constexpr Multiply kMultiply[kRows] = {multiply<1>, multiply<2>, multiply<3>,
                                       multiply<4>, multiply<5>, multiply<6>};

}  // namespace

void gemm(const Linear& layer, const Quantized& x, const Part& part, const Epilogue& epilogue, Matrix y) {
  const Panel panel(layer, x.blocks, part.column, columns_mask(part.columns));
  alignas(64) float tile[kRows * kColumns];
  Epilogue here = epilogue;
  for (size_t row = 0; row < part.rows; row += kRows) {
    const size_t rows = std::min(kRows, part.rows - row), at = row * y.stride;
    if (epilogue.residual) {
      here.residual = epilogue.residual + at;
      fetch(here.residual, y.stride, rows);
    }
    fetch(y.data + at, y.stride, rows);
    kMultiply[rows - 1](panel, x, part.row + row, tile);
    finish(here, rows, part.columns, tile, kColumns, {y.data + at, y.stride});
  }
}

}  // namespace vlm_edge
KERNELS_END
