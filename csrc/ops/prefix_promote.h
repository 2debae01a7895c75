// prefix_promote(confidence f32 [..., K], masked bool [..., K], threshold) -> promoted bool
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

struct PrefixPromoteSizes {
  int64_t rows;
  int64_t block;
};

inline PrefixPromoteSizes check_prefix_promote(const Tensor& confidence, const Tensor& masked,
                                               double threshold) {
  constexpr const char* op = "prefix_promote";
  check_dtype(op, "confidence", confidence, ScalarType::Float);
  check_dtype(op, "masked", masked, ScalarType::Bool);
  DMAX_CHECK(confidence.dim() >= 1, op, ": confidence must be [..., K], got a 0-D tensor");
  check_shape(op, "masked", masked, confidence.sizes(), "that of confidence");
  check_same_device(op, "masked", masked, "confidence", confidence);
  check_threshold(op, "threshold", threshold);
  const int64_t block = confidence.size(confidence.dim() - 1);
  return {block == 0 ? 0 : confidence.numel() / block, block};
}

}  // namespace dmax
