// Layers that share an input as two parallel loops: rows of x, then parts of the outputs.

#include <algorithm>
#include <list>

#include "attention_simd.h"
#include "isa.h"
#include "linear.h"

namespace vlm_edge {
namespace {

constexpr size_t kQuantizedAtOnce = 8;  // rows of x
constexpr size_t kAlone = 65536;   // bytes of weights below which a second thread does not pay
constexpr size_t kStripes = 4;     // of few rows: each starts without its weights, about 1 us
constexpr size_t kPanels = 16;     // of many rows: enough for a few threads to end at about the same time
constexpr size_t kShortest = 48;   // rows of x that are worth packing columns for

struct Task {
  size_t output;
  Part part;
};

// Columns, a few tasks of about as many bytes of weights for each thread; in whole cache lines of a row.
std::vector<Task> stripes(const LinearGroup& group, size_t m) {
  size_t bytes = 0;
  for (const Linear& layer : group.layers) bytes += layer.bytes();
  std::vector<Task> tasks;
  for (size_t i = 0; i < group.outputs(); ++i) {
    const Linear& layer = group.layers[i];
    const size_t own = group.gated ? bytes : layer.bytes();
    const size_t unit = layer.format == WeightFormat::kInt8 ? kColumns : 2 * kColumns;
    const size_t wanted = bytes / kStripes * layer.n / own;
    const size_t width = bytes < kAlone ? kStripe : std::clamp((wanted + unit / 2) / unit * unit, unit, kStripe);
    for (size_t at = 0; at < layer.n; at += width)
      tasks.push_back({i, {0, m, at, std::min(width, layer.n - at)}});
  }
  return tasks;
}

// Columns that are packed together. With few of them the rows are split too, and some are packed twice.
std::vector<Task> panels(const LinearGroup& group, size_t m) {
  size_t count = 0;
  for (size_t i = 0; i < group.outputs(); ++i) count += (group.layers[i].n + kColumns - 1) / kColumns;
  const size_t chunks = std::min((kPanels + count - 1) / count, std::max<size_t>(1, m / kShortest));
  const size_t rows = (m + chunks - 1) / chunks;
  std::vector<Task> tasks;
  for (size_t i = 0; i < group.outputs(); ++i)
    for (size_t at = 0; at < group.layers[i].n; at += kColumns)
      for (size_t row = 0; row < m; row += rows)
        tasks.push_back({i, {row, std::min(rows, m - row), at, std::min(kColumns, group.layers[i].n - at)}});
  return tasks;
}

}  // namespace
}  // namespace vlm_edge

KERNELS_BEGIN
namespace vlm_edge {
namespace {

// a * sigmoid(a) to 3e-7 (relative).
ALWAYS_INLINE __m512 silu(__m512 a) {
  // exp of -|a| never overflows; 2^t needs t more exactly than a float holds it.
  const __m512 log2e = _mm512_set1_ps(1.44269502f), log2e_rest = _mm512_set1_ps(1.92596299e-8f);
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(a)));
  const __m512 t = _mm512_mul_ps(x, log2e);
  const __m512 rest = _mm512_fmadd_ps(x, log2e_rest, _mm512_fmsub_ps(x, log2e, t));
  const __m512 power = simd::exp2(t);
  const __m512 e = _mm512_fmadd_ps(_mm512_mul_ps(power, _mm512_set1_ps(0.693147181f)), rest, power);
  const __m512 one = _mm512_set1_ps(1.0f);
  const __mmask16 negative = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_div_ps(_mm512_mul_ps(a, _mm512_mask_mov_ps(one, negative, e)), _mm512_add_ps(one, e));
}

// y = combine(y, other) for each value.
template <class Combine>
ALWAYS_INLINE void combine(size_t rows, size_t columns, Matrix y, const float* other, size_t stride,
                           const Combine& combined) {
  for (size_t r = 0; r < rows; ++r) {
    float* row = y.data + r * y.stride;
    for (size_t i = 0; i < columns; i += 16) {
      const __mmask16 mask = simd::mask(int64_t(columns - i));
      const __m512 with = _mm512_maskz_loadu_ps(mask, other + r * stride + i);
      _mm512_mask_storeu_ps(row + i, mask, combined(_mm512_maskz_loadu_ps(mask, row + i), with));
    }
  }
}

void gate(size_t rows, size_t columns, Matrix y, const float* other, size_t stride) {
  combine(rows, columns, y, other, stride, [&](auto a, auto b) INLINED { return _mm512_mul_ps(silu(a), b); });
}

void add(size_t rows, size_t columns, Matrix y, const float* other, size_t stride) {
  combine(rows, columns, y, other, stride, [&](auto a, auto b) INLINED { return _mm512_add_ps(a, b); });
}

}  // namespace
}  // namespace vlm_edge
KERNELS_END

namespace vlm_edge {

void linears(const LinearGroup& group, size_t m, const float* x, const float* residual,
             const std::vector<float*>& y, const ParallelFor& parallel_for) {
  if (m == 0) return;
  const size_t k = group.layers[0].k;

  std::list<Quantized> ways;  // one for each way in which layers cut K into blocks
  std::vector<const Quantized*> inputs;
  for (const Linear& layer : group.layers) {
    const Blocks blocks(layer);
    auto way = std::find_if(ways.begin(), ways.end(), [&](auto& each) { return each.blocks == blocks; });
    if (way == ways.end()) way = ways.emplace(ways.end(), blocks, m);
    inputs.push_back(&*way);
  }
  parallel_for((m + kQuantizedAtOnce - 1) / kQuantizedAtOnce, [&](size_t i) {
    Scratch<float> normal(group.norm ? k : 0);
    for (size_t row = i * kQuantizedAtOnce; row < std::min(m, (i + 1) * kQuantizedAtOnce); ++row) {
      const float* values = x + row * k;
      if (group.norm) {
        normalise(values, group.norm, group.epsilon, k, normal.get());
        values = normal.get();
      }
      for (const Quantized& way : ways) quantize(values, row, way);
    }
  });

  const bool few = m <= kStreamed;
  const auto product = few ? gemv : gemm;
  const std::vector<Task> tasks = few ? stripes(group, m) : panels(group, m);
  const auto run = [&](size_t i) {
    const auto& [output, part] = tasks[i];
    const size_t n = group.layers[output].n, at = part.row * n + part.column;
    const Matrix out{y[output] + at, n};
    product(group.layers[output], *inputs[output], part, out);
    if (group.gated) {
      Scratch<float> other(part.rows * part.columns);
      product(group.layers[1], *inputs[1], part, {other.get(), part.columns});
      gate(part.rows, part.columns, out, other.get(), part.columns);
    }
    if (residual) add(part.rows, part.columns, out, residual + at, n);
  };
  parallel_for(tasks.size(), run);
}

}  // namespace vlm_edge
