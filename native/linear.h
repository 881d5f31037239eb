// y = x @ W + bias with integer weights, straight from the layout they have in the bundle.
//
// Activations are quantized here, to symmetric int8: one scale for each row of x, or for each row
// and block of K where the weight's scales have blocks. Products are summed exactly, as integers:
//
//   y[m, n] = sum over blocks b of  x_scale[m, b] * w_scale[b, n] * sum over k in b of q[m, k] * w[k, n]
//
// The instruction (vpdpbusd) multiplies unsigned by signed bytes: it gets w + offset, and
// offset * sum(q) is taken off again. A NaN or an infinity in a row makes its outputs NaN.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

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
};

// x float32 [m, k], y float32 [m, n].
void linear(const Linear& layer, size_t m, const float* x, float* y, const ParallelFor& parallel_for);

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
  Scratch<int8_t> q;      // [m, blocks.row_bytes()]
  Scratch<float> scale;   // [m, blocks.scales()]
  Scratch<int32_t> start;  // [m, blocks.count]: -offset * sum(q), where each sum of products begins

  Quantized(const Blocks& blocks, size_t m)
      : q(m * blocks.row_bytes()), scale(m * blocks.scales()), start(m * blocks.count) {}
};

// Rows [begin, end) of x.
void quantize(const Blocks& blocks, int offset, const float* x, size_t begin, size_t end,
              const Quantized& out);

// Few rows: streams the weights once, at the speed of memory.
void gemv(const Linear& layer, const Blocks& blocks, size_t m, const Quantized& x, float* y,
          const ParallelFor& parallel_for);

// Many rows: packs 64 columns at a time and computes at the speed of the processor.
void gemm(const Linear& layer, const Blocks& blocks, size_t m, const Quantized& x, float* y,
          const ParallelFor& parallel_for);

}  // namespace vlm_edge
