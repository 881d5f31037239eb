// y = x @ W + bias with integer weights, straight from the layout they have in the bundle.
//
// Activations are quantized here, to symmetric int8: one scale for each row of x, or for each row
// and block of K where the weight's scales have blocks. Products are summed exactly, as integers:
//
//   y[m, n] = sum over blocks b of  x_scale[m, b] * w_scale[b, n] * sum over k in b of q[m, k] * w[k, n]
//
// The instruction (vpdpbusd) multiplies unsigned by signed bytes: it gets w + offset, and
// offset * sum(q) is taken off again. A NaN or an infinity in a row makes its outputs NaN.
//
// x_scale is the largest magnitude / 127, or clip / 127 where that is less: what lies outside is
// clipped to it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "epilogue.h"
#include "parallel.h"

namespace vlm_edge {

enum class WeightFormat { kInt8, kInt4 };

struct Linear {
  WeightFormat format;
  size_t k, n;            // W is [k, n]
  const uint8_t* weight;  // int8 [k, n]; or two int4 in a byte [k, n / 2], the even column low
  const float* scale;     // [n], or [k / block, n]
  const float* bias;      // [n] or null
  size_t block;           // rows of W that share a scale; 0: all of them

  size_t bytes() const { return format == WeightFormat::kInt8 ? k * n : k * n / 2; }
};

// x / sqrt(mean(x^2) + epsilon) * scale; with a bias x is x - mean(x), and the bias is added: RMS and
// layer normalisation. The means are sums of doubles.
struct Norm {
  const float* scale;  // [k] or null: none
  const float* bias;   // [k] or null
  float epsilon;
};

// Layers of the same k that share an input, and what stands around them in a transformer.
struct LinearGroup {
  std::vector<Linear> layers;
  Norm norm;              // of x, before it is rounded
  float clip;             // magnitude beyond which what is rounded is clipped; infinity: nowhere
  bool gated;             // two layers of the same n have one output: silu(first) * second
  Activation activation;  // of a single layer's output
  const float* factor;    // [n] or null: the output of a single layer, activated, is multiplied by it

  size_t outputs() const { return gated ? 1 : layers.size(); }
};

// x float32 [m, k]; y[i] float32 [m, n] for each output; residual float32 [m, n] or null is added to
// the output of a single layer.
void linears(const LinearGroup& group, size_t m, const float* x, const float* residual,
             const std::vector<float*>& y, const ParallelFor& parallel_for);

// K cut into blocks; each block of q starts at a multiple of 4 and is padded with zeros to one.
// Without scales for blocks there is still a cut where a sum could overflow 32 bits.
struct Blocks {
  static constexpr size_t kLongest = 65536;  // 65536 * 255 * 127 < 2^31

  size_t k, size, count, padded;
  bool scaled;  // each has its own scales

  explicit Blocks(const Linear& layer)
      : k(layer.k),
        size(std::max<size_t>(1, std::min(layer.block ? layer.block : layer.k, kLongest))),
        count((layer.k + size - 1) / size),
        padded((size + 3) / 4 * 4),
        scaled(layer.block != 0) {}

  bool operator==(const Blocks& other) const {
    return k == other.k && size == other.size && scaled == other.scaled;
  }
  size_t rows(size_t block) const { return std::min(size, k - block * size); }
  size_t row_bytes() const { return count * padded; }  // of q
  size_t scales() const { return scaled ? count : 1; }  // of a row of x
};

// Memory for the length of a call, aligned to cache lines, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Rows of x as the kernels want them.
struct Quantized {
  Blocks blocks;
  Scratch<int8_t> q;     // [m, blocks.row_bytes()]
  Scratch<float> scale;  // [m, blocks.scales()]
  Scratch<int32_t> sum;  // [m, blocks.count], of q

  Quantized(const Blocks& cut, size_t m)
      : blocks(cut), q(m * cut.row_bytes()), scale(m * cut.scales()), sum(m * cut.count) {}
};

// Row `m` of x, or what the norm made of it; `clip` is the group's.
void quantize(const float* row, size_t m, float clip, const Quantized& out);

// y = norm of x, k values.
void normalise(const float* x, const Norm& norm, size_t k, float* y);

// A rectangle of an output.
struct Part {
  size_t row, rows, column, columns;
};

inline constexpr size_t kStreamed = 4;    // rows up to which weights are not packed
inline constexpr size_t kStripe = 1024;   // columns that gemv computes at once, at most
inline constexpr size_t kColumns = 64;    // a group of columns: what gemm computes at once, at most

// A part of x @ W + bias and what follows it, written to y. Few rows: streams the weights once, at the speed of memory.
void gemv(const Linear& layer, const Quantized& x, const Part& part, const Epilogue& epilogue, Matrix y);

// Many rows: packs the columns and computes at the speed of the processor.
void gemm(const Linear& layer, const Quantized& x, const Part& part, const Epilogue& epilogue, Matrix y);

}  // namespace vlm_edge
