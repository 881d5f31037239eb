// Scaled dot-product attention on the CPU, plain C++: what the operators in attention_op.cpp compute.
//
// Two ways. Many queries (vision, prefill): tiles of keys and values in bfloat16, float32 softmax with a
// running maximum and sum (FlashAttention, arXiv 2205.14135). Few queries (decode): float32 throughout,
// since reading the cache takes all the time.
//
// All arrays are contiguous float32 unless said otherwise. Activations are token-major
// [batch, tokens, heads * head_dim]; a cache is [batch, kv_heads, capacity, head_dim], in float32 or int8.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace vlm_edge {

struct AttentionShape {
  int64_t batch, queries, heads, kv_heads, head_dim;
  float scale;
};

// cos, sin: [batch or 1, queries, half]. Pairs are (i, i + half), or (2i, 2i + 1) when interleaved; the
// head_dim - 2 * half last channels are not rotated. As ONNX's RotaryEmbedding (opset 23).
struct Rotary {
  const float* cos;
  const float* sin;
  int64_t half;
  bool batched;
  bool interleaved;
};

// The keys or the values of a cache. Where `floats` is null a number is `rounded` times the scale of its
// position and head, scales being [batch, kv_heads, capacity].
struct CacheArray {
  float* floats;
  int8_t* rounded;
  float* scales;
};

// Keys and values that stay from call to call; query i of batch b has the position start[b] + i and sees
// the positions up to its own, the last `window` of them if window is not 0.
struct Cache {
  CacheArray keys;
  CacheArray values;
  int64_t capacity;
  const int64_t* start;  // [batch]
  int64_t window;
};

// Every query sees every key. k, v: [batch, keys, kv_heads * head_dim].
void attention(const AttentionShape& shape, const float* q, const float* k, const float* v,
               int64_t keys, float* y, const ParallelFor& parallel);

// Rotates q and k (rotary null: not), writes k and v into the cache, and attends causally to the cache.
// k, v: [batch, queries, kv_heads * head_dim]. Needs start[b] + queries <= capacity.
void cached_attention(const AttentionShape& shape, const Rotary* rotary, const float* q, const float* k,
                      const float* v, const Cache& cache, float* y, const ParallelFor& parallel);

}  // namespace vlm_edge
