// sample_merge(maximum, sum_exp, token, score, weight, [S, ...] each) -> token, probability [...]
#pragma once

#include "ops/top1_merge.h"

namespace dmax {

inline ShardSizes check_sample_merge(const Tensor& maximum, const Tensor& sum_exp,
                                     const Tensor& token, const Tensor& score, const Tensor& weight,
                                     double temperature) {
  constexpr const char* op = "sample_merge";
  const ShardSizes sizes = check_shards(op, maximum, sum_exp, token, temperature);
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"score", score}, {"weight", weight}}) {
    check_dtype(op, name, t, ScalarType::Float);
    check_shape(op, name, t, maximum.sizes(), "that of maximum");
    check_same_device(op, name, t, "maximum", maximum);
  }
  return sizes;
}

}  // namespace dmax
