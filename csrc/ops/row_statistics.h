// row_statistics(logits [..., V]) -> token i64, confidence, runner_up, entropy, logsumexp f32 [...]
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

struct RowStatisticsSizes {
  int64_t vocab;
};

inline RowStatisticsSizes check_row_statistics(const Tensor& logits, double temperature,
                                               int64_t suppress_token) {
  constexpr const char* op = "row_statistics";
  const int64_t vocab = check_logits(op, "logits", logits);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, vocab);
  return {vocab};
}

}  // namespace dmax
