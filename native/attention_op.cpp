// Attention over a call's own or over cached keys for ONNX Runtime: checks, then attention() and cached_attention().

#include "attention_op.h"

#include <cmath>
#include <cstring>
#include <string>

namespace vlm_edge {
namespace {

constexpr size_t kCos = 3, kSin = 4;  // inputs of CachedAttention

void require_shape(const char* name, const Tensor& tensor, const Dims& expected) {
  require(tensor.dims == expected,
          std::string(name) + " must be " + text(expected) + ", and is " + text(tensor.dims));
}

// An output shaped as an input; a dimension without a name cannot be said.
void same_shape(const Shapes& shapes, size_t output, size_t input, OrtElementType type = kFloat) {
  const Shape shape = shapes.input(input);
  if (shape.dims.empty()) return;
  for (size_t i = 0; i < shape.dims.size(); ++i)
    if (shape.dims[i] < 0 && shape.names[i].empty()) return;
  shapes.output(output, type, shape);
}

// The output that continues a past [batch, kv_heads, capacity, ...]; bound as one value they are the same
// memory.
template <class T>
T* present_of(const Call& call, size_t output, const Tensor& past, const ParallelFor& parallel) {
  T* present = call.output<T>(output, past.dims);
  const size_t heads = past.dims[0] * past.dims[1], size = past.dims[2] * past.dims[3];
  if (present != past.data)
    parallel(heads, [&](size_t head) {
      std::memcpy(present + head * size, past.as<T>() + head * size, size * sizeof(T));
    });
  return present;
}

}  // namespace

HeadAttributes::HeadAttributes(const Node& node)
    : heads_(node.attribute("num_heads", int64_t{0})),
      kv_heads_(node.attribute("kv_num_heads", heads_)),
      scale_(node.attribute("scale", 0.0f)) {
  require(heads_ > 0 && kv_heads_ > 0 && heads_ % kv_heads_ == 0,
          "kv_num_heads must divide num_heads, and they are " + std::to_string(kv_heads_) + " and " +
              std::to_string(heads_));
}

AttentionShape HeadAttributes::shape(const Tensor& q, const Tensor& k, const Tensor& v) const {
  require(q.dims.size() == 3 && q.dims[2] > 0 && q.dims[2] % heads_ == 0,
          "q must be [batch, tokens, " + std::to_string(heads_) + " * head_dim], and is " + text(q.dims));
  const int64_t head_dim = q.dims[2] / heads_;
  require(k.dims.size() == 3 && k.dims[0] == q.dims[0] && k.dims[1] > 0 && k.dims[2] == kv_heads_ * head_dim,
          "k must be [" + std::to_string(q.dims[0]) + ", tokens, " + std::to_string(kv_heads_ * head_dim) +
              "], and is " + text(k.dims));
  require_shape("v", v, k.dims);
  return {q.dims[0], q.dims[1], heads_, kv_heads_, head_dim,
          scale_ != 0.0f ? scale_ : 1.0f / std::sqrt(static_cast<float>(head_dim))};
}

const std::vector<Operand> Attention::kInputs = {{kFloat}, {kFloat}, {kFloat}};
const std::vector<Operand> Attention::kOutputs = {{kFloat}};

void Attention::infer(const Shapes& shapes) { same_shape(shapes, 0, 0); }

Attention::Attention(const Node& node) : heads_(node) {}

void Attention::compute(const Call& call) const {
  const Tensor q = call.input(0), k = call.input(1), v = call.input(2);
  const AttentionShape shape = heads_.shape(q, k, v);
  attention(shape, q.as<float>(), k.as<float>(), v.as<float>(), k.dims[1], call.output<float>(0, q.dims),
            call.parallel_for());
}

const std::vector<Operand> CachedAttention::kInputs = {
    {kFloat}, {kFloat}, {kFloat}, {kFloat, kOptional}, {kFloat, kOptional}, {kFloat}, {kFloat}, {kInt64}};
const std::vector<Operand> CachedAttention::kOutputs = {{kFloat}, {kFloat}, {kFloat}};

void CachedAttention::infer(const Shapes& shapes) {
  same_shape(shapes, 0, 0);
  same_shape(shapes, 1, 5);
  same_shape(shapes, 2, 6);
}

CachedAttention::CachedAttention(const Node& node)
    : heads_(node),
      rotary_dim_(node.attribute("rotary_dim", int64_t{0})),
      window_(node.attribute("window", int64_t{0})),
      interleaved_(node.attribute("interleaved", int64_t{0}) != 0),
      rotates_(node.has(kCos)) {
  require(rotates_ == node.has(kSin), "cos and sin must both be there, or neither");
  require(rotary_dim_ >= 0 && rotary_dim_ % 2 == 0,
          "rotary_dim must be even, and is " + std::to_string(rotary_dim_));
  require(window_ >= 0, "window must not be negative, and is " + std::to_string(window_));
}

const std::vector<Operand> CachedAttentionInt8::kInputs = {
    {kFloat}, {kFloat}, {kFloat}, {kFloat, kOptional}, {kFloat, kOptional},
    {kInt8},  {kInt8},  {kInt64}, {kFloat}, {kFloat}};
const std::vector<Operand> CachedAttentionInt8::kOutputs = {{kFloat}, {kInt8}, {kInt8}, {kFloat}, {kFloat}};

void CachedAttentionInt8::infer(const Shapes& shapes) {
  same_shape(shapes, 0, 0);
  same_shape(shapes, 1, 5, kInt8);
  same_shape(shapes, 2, 6, kInt8);
  same_shape(shapes, 3, 8);
  same_shape(shapes, 4, 9);
}

// cos and sin as they rotate tokens of this shape.
Rotary CachedAttention::rotary(const Call& call, const AttentionShape& shape) const {
  const Tensor cos = call.input(kCos), sin = call.input(kSin);
  const int64_t rotated = rotary_dim_ ? rotary_dim_ : shape.head_dim;
  require(rotated % 2 == 0 && rotated <= shape.head_dim,
          "rotary_dim must be even and at most head_dim, and they are " + std::to_string(rotated) + " and " +
              std::to_string(shape.head_dim));
  const bool batched = !cos.dims.empty() && cos.dims[0] == shape.batch;
  require_shape("cos", cos, {batched ? shape.batch : 1, shape.queries, rotated / 2});
  require_shape("sin", sin, cos.dims);
  return {cos.as<float>(), sin.as<float>(), rotated / 2, batched, interleaved_};
}

void CachedAttention::run(const Call& call, bool rounded) const {
  const Tensor q = call.input(0), k = call.input(1), v = call.input(2), past_key = call.input(5),
               past_value = call.input(6), start = call.input(7);
  const AttentionShape shape = heads_.shape(q, k, v);
  require(k.dims[1] == shape.queries, "k must have as many tokens as q, and their shapes are " +
                                          text(k.dims) + " and " + text(q.dims));
  const Rotary rotation = rotates_ ? rotary(call, shape) : Rotary{};
  require(past_key.dims.size() == 4, "past_key must be [batch, kv_heads, capacity, head_dim], and is " +
                                         text(past_key.dims));
  const int64_t capacity = past_key.dims[2];
  require_shape("past_key", past_key, {shape.batch, shape.kv_heads, capacity, shape.head_dim});
  require_shape("past_value", past_value, past_key.dims);
  require_shape("start", start, {shape.batch});
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t at = start.as<int64_t>()[b];
    require(at >= 0 && at <= capacity - shape.queries,
            std::to_string(shape.queries) + " tokens at position " + std::to_string(at) +
                " do not fit a cache of " + std::to_string(capacity) + " positions");
  }

  const ParallelFor parallel = call.parallel_for();
  Cache cache{{}, {}, capacity, start.as<int64_t>(), window_};
  CacheArray* arrays[2] = {&cache.keys, &cache.values};
  const Tensor* past[2] = {&past_key, &past_value};
  for (size_t i = 0; i < 2; ++i) {
    if (rounded) {
      const Tensor scales = call.input(8 + i);
      require_shape(i ? "past_value_scale" : "past_key_scale", scales,
                    {shape.batch, shape.kv_heads, capacity, 1});
      arrays[i]->rounded = present_of<int8_t>(call, 1 + i, *past[i], parallel);
      arrays[i]->scales = present_of<float>(call, 3 + i, scales, parallel);
    } else {
      arrays[i]->floats = present_of<float>(call, 1 + i, *past[i], parallel);
    }
  }
  cached_attention(shape, rotates_ ? &rotation : nullptr, q.as<float>(), k.as<float>(), v.as<float>(),
                   cache, call.output<float>(0, q.dims), parallel);
}

}  // namespace vlm_edge
