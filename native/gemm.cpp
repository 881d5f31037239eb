// y = x @ W for many rows of x: 64 columns of W are packed, then met by six rows of x at a time.

#include "isa.h"
#include "linear.h"
#include "weights.h"

KERNELS_BEGIN
namespace vlm_edge {
namespace {

constexpr size_t kRows = 6;      // of x at a time: 6 x 4 sums, 4 weights and a broadcast in 32 registers

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
      __m512i v[4];
      interleave(row(0), row(1), row(2), row(3), v);
      in_order(v);
      unrolled<4>([&](auto i) INLINED { _mm512_store_si512(panel + 64 * i, v[i]); });
    }
  }
}

// M rows of x against a panel; y points at its first column, `mask` says which columns exist.
template <size_t M>
void multiply(const Linear& layer, const uint8_t* panel, const Quantized& x, size_t row, size_t column,
              Matrix y, __mmask64 mask) {
  const Blocks& blocks = x.blocks;
  const int offset = layer.format == WeightFormat::kInt8 ? Int8Weights::kOffset : Int4Weights::kOffset;
  const size_t q_stride = blocks.row_bytes();
  for (size_t b = 0; b < blocks.count; ++b) {
    __m512i acc[M][4];
    unrolled<M>([&](auto m) INLINED {
      __m512i start = _mm512_set1_epi32(-offset * x.sum.get()[(row + m) * blocks.count + b]);
      unrolled<4>([&](auto i) INLINED { acc[m][i] = start; });
    });
    const int8_t* q = x.q.get() + row * q_stride + b * blocks.padded;
    for (size_t r = 0; r < blocks.padded; r += 4, panel += 256) {
      __m512i w[4];
      unrolled<4>([&](auto i) INLINED { w[i] = _mm512_load_si512(panel + 64 * i); });
      unrolled<M>([&](auto m) INLINED {
        int32_t four;
        __builtin_memcpy(&four, q + m * q_stride + r, 4);
        __m512i v = _mm512_set1_epi32(four);
        unrolled<4>([&](auto i) INLINED { add_products(acc[m][i], w[i], v); });
      });
    }
    unrolled<4>([&](auto i) INLINED {
      const __mmask16 columns = __mmask16(mask >> 16 * i);
      const size_t at = column + 16 * i;
      __m512 w_scale = _mm512_maskz_loadu_ps(columns, layer.scale + (blocks.scaled ? b * layer.n : 0) + at);
      __m512 bias = layer.bias ? _mm512_maskz_loadu_ps(columns, layer.bias + at) : _mm512_setzero_ps();
      unrolled<M>([&](auto m) INLINED {
        float* out = y.data + m * y.stride + 16 * i;
        __m512 x_scale = _mm512_set1_ps(x.scale.get()[(row + m) * blocks.scales() + (blocks.scaled ? b : 0)]);
        __m512 before = b ? _mm512_maskz_loadu_ps(columns, out) : bias;
        __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[m][i]), x_scale);
        _mm512_mask_storeu_ps(out, columns, _mm512_fmadd_ps(sum, w_scale, before));
      });
    });
  }
}

using Multiply = void (*)(const Linear&, const uint8_t*, const Quantized&, size_t, size_t, Matrix, __mmask64);
constexpr Multiply kMultiply[kRows] = {multiply<1>, multiply<2>, multiply<3>,
                                       multiply<4>, multiply<5>, multiply<6>};

}  // namespace

void gemm(const Linear& layer, const Quantized& x, const Part& part, Matrix y) {
  const __mmask64 mask = columns_mask(part.columns);
  Scratch<uint8_t> panel(x.blocks.row_bytes() * kColumns);
  (layer.format == WeightFormat::kInt8 ? pack<Int8Weights> : pack<Int4Weights>)(layer, x.blocks, part.column,
                                                                               mask, panel.get());
  for (size_t row = 0; row < part.rows; row += kRows) {
    kMultiply[std::min(kRows, part.rows - row) - 1](layer, panel.get(), x, part.row + row, part.column,
                                                    {y.data + row * y.stride, y.stride}, mask);
  }
}

}  // namespace vlm_edge
KERNELS_END
