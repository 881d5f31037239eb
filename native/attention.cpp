// Chooses the way of computing attention: many queries or few.

#include "attention.h"

#include "attention_detail.h"

namespace vlm_edge {
namespace {

// Up to here reading keys and values takes longer than multiplying with them in float32.
constexpr int64_t FEW_QUERIES = 4;

void run(const Problem& problem, const ParallelFor& parallel) {
  if (problem.shape.batch == 0 || problem.shape.queries == 0) return;
  if (problem.shape.queries <= FEW_QUERIES) attention_rows(problem, parallel);
  else attention_tiles(problem, parallel);
}

}  // namespace

void attention(const AttentionShape& shape, const float* q, const float* k, const float* v,
               int64_t keys, float* y, const ParallelFor& parallel) {
  run({shape, q, k, v, y, keys, nullptr, nullptr}, parallel);
}

void cached_attention(const AttentionShape& shape, const Rotary* rotary, const float* q, const float* k,
                      const float* v, const Cache& cache, float* y, const ParallelFor& parallel) {
  run({shape, q, k, v, y, 0, rotary, &cache}, parallel);
}

}  // namespace vlm_edge
