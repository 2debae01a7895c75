// linear_oput_loss(hidden_masked [..., D], hidden_predicted [..., D], weight [V, D], target [...]):
// both passes of Eq. 6 from the hidden states
#pragma once

#include "ops/linear_top1_confidence.h"
#include "ops/oput_loss.h"

namespace dmax {

inline LinearSizes check_linear_oput_loss(const char* op, const OptionalTensor& hidden_masked,
                                          const OptionalTensor& hidden_predicted,
                                          const Tensor& weight, const Tensor& target,
                                          const OptionalTensor& bias, double label_smoothing,
                                          double z_loss) {
  DMAX_CHECK(hidden_masked || hidden_predicted, op,
             ": hidden_masked or hidden_predicted must be given, got neither");
  const char* first_name = hidden_masked ? "hidden_masked" : "hidden_predicted";
  const Tensor& first = hidden_masked ? *hidden_masked : *hidden_predicted;
  const LinearSizes sizes = check_linear(op, first, weight, bias, first_name);
  if (hidden_masked && hidden_predicted) {
    check_dtype(op, "hidden_predicted", *hidden_predicted, first.scalar_type());
    check_shape(op, "hidden_predicted", *hidden_predicted, first.sizes(), "that of hidden_masked");
    check_same_device(op, "hidden_predicted", *hidden_predicted, "hidden_masked", first);
  }
  check_target(op, target, first_name, first, "one token per row of hidden states");
  check_loss_options(op, label_smoothing, z_loss);
  return sizes;
}

// The gradients of one pass's losses, and what the forward pass left for them
inline void check_linear_oput_pass(const char* op, const OptionalTensor& hidden,
                                   const char* grad_name, const Tensor& grad_loss,
                                   const char* logsumexp_name, const Tensor& logsumexp,
                                   const Tensor& target) {
  if (!hidden) return;
  check_like_target(op, grad_name, grad_loss, target, "target", target);
  check_like_target(op, logsumexp_name, logsumexp, target, "target", target);
}

}  // namespace dmax
