// linear_sample_tokens(hidden [..., D], weight [V, D], seed, bias [V]) -> token, probability [...]
#pragma once

#include "ops/linear_top1_confidence.h"

namespace dmax {

struct LinearSampleTokensSizes {
  LinearSizes linear;
  bool seed_per_row;  // then the row is not part of the counter
};

inline LinearSampleTokensSizes check_linear_sample_tokens(const Tensor& hidden,
                                                          const Tensor& weight, const Tensor& seed,
                                                          const OptionalTensor& bias,
                                                          double temperature,
                                                          int64_t suppress_token) {
  constexpr const char* op = "linear_sample_tokens";
  const LinearSizes sizes = check_linear(op, hidden, weight, bias);
  if (temperature != 0) check_temperature(op, temperature);  // 0: greedy
  check_suppress_token(op, suppress_token, sizes.vocab);
  check_dtype(op, "seed", seed, ScalarType::Long);
  check_same_device(op, "seed", seed, "hidden", hidden);
  const bool seed_per_row = seed.dim() != 1;
  Sizes need = seed_per_row ? leading_sizes(hidden) : Sizes{};
  need.push_back(2);
  check_shape(op, "seed", seed, need, "one (seed, offset), or one per row");
  return {sizes, seed_per_row};
}

}  // namespace dmax
