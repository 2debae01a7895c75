// soft_embedding and its part of one vocabulary shard.
#pragma once

#include "checks/rows.h"

namespace dmax {

struct SoftEmbeddingSizes {
  int64_t vocab;
  int64_t dim;   // D
  int64_t rows;  // product of the logits' leading sizes
};

inline SoftEmbeddingSizes check_softmax_product(const char* op, const char* logits_name,
                                                const Tensor& logits, const char* embedding_name,
                                                const Tensor& embedding, double temperature,
                                                const OptionalTensor& temperatures) {
  const int64_t vocab = check_logits(op, logits_name, logits);
  check_float(op, embedding_name, embedding);
  DMAX_CHECK(embedding.dim() == 2 && embedding.size(0) == vocab && embedding.size(1) >= 1, op, ": ",
             embedding_name, " must be [V, D] with V = ", vocab, " as in ", logits_name,
             " and D >= 1, got ", shape_text(embedding.sizes()));
  check_same_device(op, embedding_name, embedding, logits_name, logits);
  check_temperature(op, temperature);
  if (temperatures) {
    DMAX_CHECK(temperature == 1, op,
               ": temperature must be left at 1 where temperatures are given, got ", temperature);
    check_dtype(op, "temperatures", *temperatures, ScalarType::Float);
    check_shape(op, "temperatures", *temperatures, leading_sizes(logits), "one per row of logits");
    check_same_device(op, "temperatures", *temperatures, logits_name, logits);
  }
  return {vocab, embedding.size(1), logits.numel() / vocab};
}

inline SoftEmbeddingSizes check_soft_embedding(const Tensor& logits, const Tensor& embedding,
                                               double temperature,
                                               const OptionalTensor& temperatures) {
  return check_softmax_product("soft_embedding", "logits", logits, "embedding", embedding,
                               temperature, temperatures);
}

inline SoftEmbeddingSizes check_soft_embedding_partial(const Tensor& logits_shard,
                                                       const Tensor& embedding_shard,
                                                       double temperature,
                                                       const OptionalTensor& temperatures) {
  return check_softmax_product("soft_embedding_partial", "logits_shard", logits_shard,
                               "embedding_shard", embedding_shard, temperature, temperatures);
}

}  // namespace dmax
