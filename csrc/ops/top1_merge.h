// top1_merge(maximum [S, ...], sum_exp [S, ...], token [S, ...]) -> token [...], confidence [...]
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

struct Top1MergeSizes {
  int64_t shards;
  int64_t rows;
};

inline Top1MergeSizes check_top1_merge(const Tensor& maximum, const Tensor& sum_exp,
                                       const Tensor& token) {
  constexpr const char* op = "top1_merge";
  check_dtype(op, "maximum", maximum, ScalarType::Float);
  check_dtype(op, "sum_exp", sum_exp, ScalarType::Float);
  check_dtype(op, "token", token, ScalarType::Long);
  DMAX_CHECK(maximum.dim() >= 1 && maximum.size(0) >= 1, op,
             ": maximum must be [S, ...] with S >= 1 shards, got ", shape_text(maximum.sizes()));
  check_shape(op, "sum_exp", sum_exp, maximum.sizes(), "that of maximum");
  check_shape(op, "token", token, maximum.sizes(), "that of maximum");
  check_same_device(op, "sum_exp", sum_exp, "maximum", maximum);
  check_same_device(op, "token", token, "maximum", maximum);
  return {maximum.size(0), maximum.numel() / maximum.size(0)};
}

}  // namespace dmax
