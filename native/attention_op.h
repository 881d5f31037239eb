// The operators Attention and CachedAttention (domain vlm_edge, version 1). All float32 but start.
//
//   Attention(q [b, s, heads * hd], k [b, t, kv_heads * hd], v [b, t, kv_heads * hd])
//     -> y [b, s, heads * hd]
//   Every query sees every key.
//
//   CachedAttention(q [b, s, heads * hd], k [b, s, kv_heads * hd], v [b, s, kv_heads * hd],
//                   cos [b or 1, s, r / 2], sin [b or 1, s, r / 2],
//                   past_key [b, kv_heads, capacity, hd], past_value [same], start int64 [b])
//     -> (y [b, s, heads * hd], present_key [as past_key], present_value [same])
//   Rotates q and k as ONNX's RotaryEmbedding-23, writes k and v at start .. start + s - 1 and attends:
//   query i sees the positions up to start + i, the last `window` of them. Where past and present are one
//   OrtValue nothing is copied; otherwise the past is copied first.
//
// Attributes: num_heads, kv_num_heads, scale (default 1 / sqrt(hd)); for CachedAttention also interleaved
// (0), rotary_dim r (0: hd), window (0: none). With up to 4 queries float32 throughout, otherwise
// bfloat16 products with float32 sums (attention.h).
#pragma once

#include "attention.h"
#include "op.h"

namespace vlm_edge {

// The attributes and checks that both operators share.
class HeadAttributes {
 public:
  explicit HeadAttributes(const Node& node);
  // Throws where q, k and v do not fit together.
  AttentionShape shape(const Tensor& q, const Tensor& k, const Tensor& v) const;

 private:
  int64_t heads_, kv_heads_;
  float scale_;
};

class Attention {
 public:
  static constexpr const char* kName = "Attention";
  static const std::vector<Operand> kInputs, kOutputs;
  static void infer(const Shapes& shapes);

  explicit Attention(const Node& node);
  void compute(const Call& call) const;

 private:
  HeadAttributes heads_;
};

class CachedAttention {
 public:
  static constexpr const char* kName = "CachedAttention";
  static const std::vector<Operand> kInputs, kOutputs;
  static void infer(const Shapes& shapes);

  explicit CachedAttention(const Node& node);
  void compute(const Call& call) const;

 private:
  HeadAttributes heads_;
  int64_t rotary_dim_, window_;
  bool interleaved_;
};

}  // namespace vlm_edge
