// The operators Attention, CachedAttention and CachedAttentionInt8 (domain vlm_edge, version 1). All float32
// but start and what is said to be int8.
//
//   Attention(q [b, s, heads * hd], k [b, t, kv_heads * hd], v [b, t, kv_heads * hd])
//     -> y [b, s, heads * hd]
//   Every query sees every key.
//
//   CachedAttention(q [b, s, heads * hd], k [b, s, kv_heads * hd], v [b, s, kv_heads * hd],
//                   cos [b or 1, s, r / 2]?, sin [b or 1, s, r / 2]?,
//                   past_key [b, kv_heads, capacity, hd], past_value [same], start int64 [b])
//     -> (y [b, s, heads * hd], present_key [as past_key], present_value [same])
//   Rotates q and k as ONNX's RotaryEmbedding-23 if cos and sin are given, writes k and v at
//   start .. start + s - 1 and attends: query i sees the positions up to start + i, the last `window` of
//   them. Where past and present are one OrtValue nothing is copied; otherwise the past is copied first.
//
//   CachedAttentionInt8(q, k, v, cos, sin, past_key int8, past_value int8, start,
//                       past_key_scale [b, kv_heads, capacity, 1], past_value_scale [same])
//     -> (y, present_key, present_value, present_key_scale, present_value_scale)
//   The same over a cache of rounded numbers: k and v are rounded as they are written (each position and
//   head has the scale largest magnitude / 127), and attention reads what was written.
//
// Attributes: num_heads, kv_num_heads, scale (default 1 / sqrt(hd)); with a cache also interleaved (0),
// rotary_dim r (0: hd), window (0: none). With up to 4 queries float32 throughout, otherwise
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
  void compute(const Call& call) const { run(call, false); }

 protected:
  void run(const Call& call, bool rounded) const;

 private:
  Rotary rotary(const Call& call, const AttentionShape& shape) const;

  HeadAttributes heads_;
  int64_t rotary_dim_, window_;
  bool interleaved_, rotates_;
};

class CachedAttentionInt8 : public CachedAttention {
 public:
  static constexpr const char* kName = "CachedAttentionInt8";
  static const std::vector<Operand> kInputs, kOutputs;
  static void infer(const Shapes& shapes);

  using CachedAttention::CachedAttention;
  void compute(const Call& call) const { run(call, true); }
};

}  // namespace vlm_edge
