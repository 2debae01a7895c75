// linear_top1_confidence(hidden [..., D], weight [V, D], bias [V]) -> token i64, confidence f32
// [...]
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

struct LinearSizes {
  int64_t vocab;
  int64_t dim;  // D
};

// What every op that starts with the LM head's product asks of its operands
inline LinearSizes check_linear(const char* op, const Tensor& hidden, const Tensor& weight,
                                const OptionalTensor& bias, const char* hidden_name = "hidden") {
  check_float(op, hidden_name, hidden);
  DMAX_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) >= 1, op,
             ": weight must be [V, D] with V, D >= 1, got ", shape_text(weight.sizes()));
  check_dtype(op, "weight", weight, hidden.scalar_type());
  DMAX_CHECK(hidden.dim() >= 1 && hidden.size(hidden.dim() - 1) == weight.size(1), op, ": ",
             hidden_name, " must be [..., D] with D = ", weight.size(1), " as in weight, got ",
             shape_text(hidden.sizes()));
  check_same_device(op, "weight", weight, hidden_name, hidden);
  if (bias) {
    check_dtype(op, "bias", *bias, hidden.scalar_type());
    check_shape(op, "bias", *bias, Sizes{weight.size(0)}, "one per token");
    check_same_device(op, "bias", *bias, hidden_name, hidden);
  }
  return {weight.size(0), weight.size(1)};
}

inline LinearSizes check_linear_top1_confidence(const Tensor& hidden, const Tensor& weight,
                                                const OptionalTensor& bias, double temperature,
                                                int64_t suppress_token) {
  constexpr const char* op = "linear_top1_confidence";
  const LinearSizes sizes = check_linear(op, hidden, weight, bias);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, sizes.vocab);
  return sizes;
}

}  // namespace dmax
