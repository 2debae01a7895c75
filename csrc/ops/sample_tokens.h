// sample_tokens(logits [..., V], seed i64 [2] or [..., 2]) -> token i64 [...], probability f32
// [...]
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

struct SampleTokensSizes {
  int64_t vocab;
  bool seed_per_row;  // then the row is not part of the counter
};

// True where the seed tensor holds one (seed, offset) per row
inline bool check_seed(const char* op, const Tensor& seed, const char* logits_name,
                       const Tensor& logits) {
  check_dtype(op, "seed", seed, ScalarType::Long);
  check_same_device(op, "seed", seed, logits_name, logits);
  const bool per_row = seed.dim() != 1;
  Sizes need = per_row ? leading_sizes(logits) : Sizes{};
  need.push_back(2);
  check_shape(op, "seed", seed, need, "one (seed, offset), or one per row");
  return per_row;
}

inline SampleTokensSizes check_sample_tokens(const Tensor& logits, const Tensor& seed,
                                             double temperature, int64_t suppress_token) {
  constexpr const char* op = "sample_tokens";
  const int64_t vocab = check_logits(op, "logits", logits);
  if (temperature != 0) check_temperature(op, temperature);  // 0: greedy
  check_suppress_token(op, suppress_token, vocab);
  return {vocab, check_seed(op, seed, "logits", logits)};
}

}  // namespace dmax
