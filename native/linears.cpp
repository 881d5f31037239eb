// Layers that share an input as two parallel loops: rows of x, then parts of the outputs.

#include <algorithm>
#include <list>

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
    Scratch<float> normal(group.norm.scale ? k : 0);
    for (size_t row = i * kQuantizedAtOnce; row < std::min(m, (i + 1) * kQuantizedAtOnce); ++row) {
      const float* values = x + row * k;
      if (group.norm.scale) {
        normalise(values, group.norm, k, normal.get());
        values = normal.get();
      }
      for (const Quantized& way : ways) quantize(values, row, group.clip, way);
    }
  });

  const bool few = m <= kStreamed;
  const auto product = few ? gemv : gemm;
  const std::vector<Task> tasks = few ? stripes(group, m) : panels(group, m);
  const auto run = [&](size_t i) {
    const auto& [output, part] = tasks[i];
    const size_t n = group.layers[output].n, at = part.row * n + part.column;
    const Matrix out{y[output] + at, n};
    const Epilogue epilogue{group.activation, group.factor ? group.factor + part.column : nullptr,
                            residual ? residual + at : nullptr};
    product(group.layers[output], *inputs[output], part, epilogue, out);
    if (group.gated) {
      Scratch<float> other(part.rows * part.columns);
      product(group.layers[1], *inputs[1], part, {}, {other.get(), part.columns});
      gate(part.rows, part.columns, out, other.get(), part.columns);
    }
  };
  parallel_for(tasks.size(), run);
}

}  // namespace vlm_edge
