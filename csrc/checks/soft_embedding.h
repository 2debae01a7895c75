// soft_embedding and its part of one vocabulary shard, and the cut that limits either to probable
// tokens.
#pragma once

#include "checks/rows.h"
#include "common/draw_options.h"

namespace dmax {

struct SoftEmbeddingSizes {
  int64_t vocab;
  int64_t dim;   // D
  int64_t rows;  // product of the logits' leading sizes
};

inline SoftEmbeddingSizes check_softmax_product(const char* op, const char* logits_name,
                                                const Tensor& logits, const char* embedding_name,
                                                const Tensor& embedding, double temperature,
                                                const OptionalTensor& temperatures,
                                                const OptionalTensor& least,
                                                const OptionalTensor& last_id) {
  const int64_t vocab = check_logits(op, logits_name, logits);
  check_float(op, embedding_name, embedding);
  DMAX_CHECK(embedding.dim() == 2 && embedding.size(0) == vocab && embedding.size(1) >= 1, op, ": ",
             embedding_name, " must be [V, D] with V = ", vocab, " as in ", logits_name,
             " and D >= 1, got ", shape_text(embedding.sizes()));
  check_same_device(op, embedding_name, embedding, logits_name, logits);
  check_temperatures(op, logits_name, logits, temperature, temperatures);
  DMAX_CHECK(least.has_value() == last_id.has_value(), op,
             ": least and last_id must be given together, got one of them");
  if (least) {
    check_dtype(op, "least", *least, ScalarType::Float);
    check_dtype(op, "last_id", *last_id, ScalarType::Long);
    for (const auto& [name, t] :
         {std::pair<const char*, const Tensor&>{"least", *least}, {"last_id", *last_id}}) {
      check_shape(op, name, t, leading_sizes(logits), "one per row of logits");
      check_same_device(op, name, t, logits_name, logits);
    }
  }
  return {vocab, embedding.size(1), logits.numel() / vocab};
}

inline SoftEmbeddingSizes check_soft_embedding(const Tensor& logits, const Tensor& embedding,
                                               double temperature,
                                               const OptionalTensor& temperatures,
                                               const OptionalTensor& least,
                                               const OptionalTensor& last_id) {
  return check_softmax_product("soft_embedding", "logits", logits, "embedding", embedding,
                               temperature, temperatures, least, last_id);
}

inline SoftEmbeddingSizes check_soft_embedding_partial(const Tensor& logits_shard,
                                                       const Tensor& embedding_shard,
                                                       double temperature,
                                                       const OptionalTensor& temperatures,
                                                       const OptionalTensor& least,
                                                       const OptionalTensor& last_id) {
  return check_softmax_product("soft_embedding_partial", "logits_shard", logits_shard,
                               "embedding_shard", embedding_shard, temperature, temperatures, least,
                               last_id);
}

// Returns V
inline int64_t check_top_p_cut(const Tensor& logits, double top_p, double temperature,
                               const OptionalTensor& temperatures) {
  constexpr const char* op = "top_p_cut";
  const int64_t vocab = check_logits(op, "logits", logits);
  DMAX_CHECK(is_draw_top_p(top_p), op, ": top_p must be above 0 and at most 1, got ", top_p);
  check_temperatures(op, "logits", logits, temperature, temperatures);
  return vocab;
}

}  // namespace dmax
