// topk_confidence(logits [..., V], k) -> tokens i64 [..., k], confidences f32 [..., k]
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

constexpr int64_t kMaxTopK = 8;

struct TopkConfidenceSizes {
  int64_t vocab;
};

inline void check_top_k(const char* op, const char* name, int64_t k, int64_t vocab) {
  DMAX_CHECK(k >= 1 && k <= kMaxTopK && k <= vocab, op, ": ", name, " must be in 1..",
             vocab < kMaxTopK ? vocab : kMaxTopK, " (at most ", kMaxTopK, " and at most V), got ",
             k);
}

inline TopkConfidenceSizes check_topk_confidence(const Tensor& logits, int64_t k,
                                                 double temperature, int64_t suppress_token) {
  constexpr const char* op = "topk_confidence";
  const int64_t vocab = check_logits(op, "logits", logits);
  check_top_k(op, "k", k, vocab);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, vocab);
  return {vocab};
}

}  // namespace dmax
