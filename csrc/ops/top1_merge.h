// top1_merge(maximum [S, ...], sum_exp [S, ...], token [S, ...]) -> token [...], confidence [...]
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

struct ShardSizes {
  int64_t shards;
  int64_t rows;
};

// What top1_merge and sample_merge share
inline ShardSizes check_shards(const char* op, const Tensor& maximum, const Tensor& sum_exp,
                               const Tensor& token, double temperature) {
  check_dtype(op, "maximum", maximum, ScalarType::Float);
  check_dtype(op, "sum_exp", sum_exp, ScalarType::Float);
  check_dtype(op, "token", token, ScalarType::Long);
  DMAX_CHECK(maximum.dim() >= 1 && maximum.size(0) >= 1, op,
             ": maximum must be [S, ...] with S >= 1 shards, got ", shape_text(maximum.sizes()));
  check_shape(op, "sum_exp", sum_exp, maximum.sizes(), "that of maximum");
  check_shape(op, "token", token, maximum.sizes(), "that of maximum");
  check_same_device(op, "sum_exp", sum_exp, "maximum", maximum);
  check_same_device(op, "token", token, "maximum", maximum);
  check_temperature(op, temperature);
  return {maximum.size(0), maximum.numel() / maximum.size(0)};
}

inline ShardSizes check_top1_merge(const Tensor& maximum, const Tensor& sum_exp,
                                   const Tensor& token, double temperature) {
  return check_shards("top1_merge", maximum, sum_exp, token, temperature);
}

}  // namespace dmax
