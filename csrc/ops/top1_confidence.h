// top1_confidence(logits [..., V]) -> token i64 [...], confidence f32 [...]
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

struct Top1ConfidenceSizes {
  int64_t vocab;
};

inline Top1ConfidenceSizes check_top1_confidence(const Tensor& logits, double temperature,
                                                 int64_t suppress_token) {
  constexpr const char* op = "top1_confidence";
  const int64_t vocab = check_logits(op, "logits", logits);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, vocab);
  return {vocab};
}

}  // namespace dmax
