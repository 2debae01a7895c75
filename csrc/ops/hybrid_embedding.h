// hybrid_embedding(embedding [V, D], token [...] or [..., k], confidence, masked [...]) -> [..., D]
#pragma once

#include "common/tensor_checks.h"
#include "ops/topk_confidence.h"

namespace dmax {

struct HybridEmbeddingSizes {
  int64_t vocab;
  int64_t dim;        // D
  int64_t positions;  // product of masked's sizes
  int64_t k;          // tokens per position
};

inline HybridEmbeddingSizes check_hybrid_embedding(const Tensor& embedding, const Tensor& token,
                                                   const Tensor& confidence, const Tensor& masked,
                                                   int64_t mask_token_id) {
  constexpr const char* op = "hybrid_embedding";
  check_float(op, "embedding", embedding);
  DMAX_CHECK(embedding.dim() == 2 && embedding.size(0) >= 1 && embedding.size(1) >= 1, op,
             ": embedding must be [V, D] with V, D >= 1, got ", shape_text(embedding.sizes()));
  check_integer(op, "token", token);
  check_dtype(op, "confidence", confidence, ScalarType::Float);
  check_dtype(op, "masked", masked, ScalarType::Bool);
  const bool top_1 = token.dim() == masked.dim();
  Sizes need = sizes_of(masked);
  if (!top_1) need.push_back(token.dim() > 0 ? token.size(token.dim() - 1) : 1);
  check_shape(op, "token", token, need, "masked's shape, or that with k tokens behind");
  check_shape(op, "confidence", confidence, token.sizes(), "that of token");
  check_mask_token_id(op, mask_token_id, embedding.size(0));
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"token", token},
                                {"confidence", confidence},
                                {"masked", masked}}) {
    check_same_device(op, name, t, "embedding", embedding);
  }
  const int64_t k = top_1 ? 1 : need.back();
  DMAX_CHECK(k >= 1 && k <= kMaxTopK, op, ": token must hold 1..", kMaxTopK,
             " tokens per position, got ", k);
  return {embedding.size(0), embedding.size(1), masked.numel(), k};
}

inline HybridEmbeddingSizes check_hybrid_embedding_backward(
    const Tensor& grad_output, const Tensor& embedding, const Tensor& token,
    const Tensor& confidence, const Tensor& masked, int64_t mask_token_id) {
  const HybridEmbeddingSizes sizes =
      check_hybrid_embedding(embedding, token, confidence, masked, mask_token_id);
  constexpr const char* op = "hybrid_embedding_backward";
  Sizes need = sizes_of(masked);
  need.push_back(sizes.dim);
  check_shape(op, "grad_output", grad_output, need, "that of the output");
  check_dtype(op, "grad_output", grad_output, embedding.scalar_type());
  check_same_device(op, "grad_output", grad_output, "embedding", embedding);
  return sizes;
}

}  // namespace dmax
