// What both ways of attention share: which keys a query sees, rotation, cache writes, threads, memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "attention.h"

namespace vlm_edge {

constexpr float LOG2E = 1.4426950408889634f;  // scores are kept in base 2: exp2 is cheaper than exp

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The arrays of one call and who sees what. Rows are the queries that share a key-value head, ordered
// (query, head in group), so that a block of rows sees nearly the same keys.
struct Problem {
  AttentionShape shape;
  const float* q;
  const float* k;  // the call's own keys and values, [batch, tokens, kv_heads * head_dim]
  const float* v;
  float* y;
  int64_t keys;           // tokens of k; without a cache
  const Rotary* rotary;   // null: none
  const Cache* cache;     // null: every query sees all of k

  int64_t group() const { return shape.heads / shape.kv_heads; }
  int64_t rows() const { return shape.queries * group(); }
  int64_t start(int64_t b) const { return cache ? cache->start[b] : 0; }
  // Query i of batch b sees the keys first_key .. end_key - 1.
  int64_t end_key(int64_t b, int64_t i) const { return cache ? start(b) + i + 1 : keys; }
  int64_t first_key(int64_t b, int64_t i) const {
    return cache && cache->window ? std::max<int64_t>(0, end_key(b, i) - cache->window) : 0;
  }
  // Offset of (batch, token, head) in a token-major array of `heads` heads.
  int64_t offset(int64_t b, int64_t tokens, int64_t token, int64_t heads, int64_t head) const {
    return ((b * tokens + token) * heads + head) * shape.head_dim;
  }
  int64_t row_offset(int64_t b, int64_t kv_head, int64_t row) const {
    return offset(b, shape.queries, row / group(), shape.heads, kv_head * group() + row % group());
  }
};

// Keys or values of one head: a pointer to the first, the distance between two, and the scales of int8 ones.
template <class T>
struct HeadOf {
  const T* data;
  int64_t stride;
  const float* scales = nullptr;

  HeadOf from(int64_t j) const { return {data + j * stride, stride, scales ? scales + j : nullptr}; }
};
using Head = HeadOf<float>;

// Of one head, from token `begin` on; T is int8_t where the cache is.
template <class T>
HeadOf<T> head_of(const Problem& problem, const float* own, const CacheArray* cached, int64_t b, int64_t h,
                  int64_t begin) {
  const auto& s = problem.shape;
  const int64_t row = cached ? (b * s.kv_heads + h) * problem.cache->capacity + begin : 0;
  if constexpr (std::is_same_v<T, int8_t>) {
    return {cached->rounded + row * s.head_dim, s.head_dim, cached->scales + row};
  } else {
    if (cached) return {cached->floats + row * s.head_dim, s.head_dim};
    return {own + problem.offset(b, problem.keys, begin, s.kv_heads, h), s.kv_heads * s.head_dim};
  }
}
template <class T>
HeadOf<T> keys_of(const Problem& problem, int64_t b, int64_t h, int64_t begin) {
  return head_of<T>(problem, problem.k, problem.cache ? &problem.cache->keys : nullptr, b, h, begin);
}
template <class T>
HeadOf<T> values_of(const Problem& problem, int64_t b, int64_t h, int64_t begin) {
  return head_of<T>(problem, problem.v, problem.cache ? &problem.cache->values : nullptr, b, h, begin);
}

// `count` rows of `width` numbers in float32, into `out`.
void dequantize(const HeadOf<int8_t>& rows, int64_t count, int64_t width, float* out);

// One head of the call's token i, rotated and times scale.
inline void rotate(const Problem& problem, int64_t b, int64_t i, const float* in, float scale, float* out) {
  const int64_t width = problem.shape.head_dim;
  int64_t done = 0;
  if (problem.rotary) {
    const Rotary& r = *problem.rotary;
    const int64_t half = r.half, at = ((r.batched ? b : 0) * problem.shape.queries + i) * half;
    const int64_t step = r.interleaved ? 2 : 1, other = r.interleaved ? 1 : half;
    for (int64_t c = 0; c < half; ++c) {
      const float x = in[c * step], z = in[c * step + other];
      out[c * step] = (x * r.cos[at + c] - z * r.sin[at + c]) * scale;
      out[c * step + other] = (z * r.cos[at + c] + x * r.sin[at + c]) * scale;
    }
    done = 2 * half;
  }
  for (int64_t c = done; c < width; ++c) out[c] = in[c] * scale;
}

// Writes those of the call's own tokens whose positions are in [begin, end) into the cache.
void write_cache(const Problem& problem, int64_t b, int64_t h, int64_t begin, int64_t end);

// Items are taken by whoever is free, so that unequal ones balance.
template <class F>
void balanced(const ParallelFor& parallel, int64_t count, const F& item) {
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(count, 64), [&](size_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) item(i);
  });
}

// Memory that a thread keeps from call to call, so that no call waits for fresh pages.
class Buffer {
 public:
  // At least `bytes`, aligned to a cache line; what was in it is lost.
  char* get(int64_t bytes) {
    if (bytes > size_) {
      size_ = round_up(bytes, 4096);
      data_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

// Hands out cache-line aligned pieces of a Buffer; built twice: once to count, once to give.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    char* p = base_ + used_;
    used_ += round_up(count * sizeof(T), 64);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

void attention_tiles(const Problem& problem, const ParallelFor& parallel);  // many queries, bfloat16
void attention_rows(const Problem& problem, const ParallelFor& parallel);   // few queries, float32

}  // namespace vlm_edge
