// Ops that start with the LM head's product, hidden [..., D] x weight [V, D]^T + bias [V].
#pragma once

#include "checks/loss.h"
#include "checks/rows.h"

namespace dmax {

struct LinearSizes {
  int64_t vocab;
  int64_t dim;  // D
};

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
  check_vocab(op, weight, weight.size(0));
  return {weight.size(0), weight.size(1)};
}

inline LinearSizes check_linear_top1_confidence(const Tensor& hidden, const Tensor& weight,
                                                const OptionalTensor& bias, double temperature,
                                                int64_t suppress_token,
                                                const OptionalTensor& allowed) {
  constexpr const char* op = "linear_top1_confidence";
  const LinearSizes sizes = check_linear(op, hidden, weight, bias);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, sizes.vocab);
  if (allowed) check_allowed(op, *allowed, sizes.vocab, "hidden", hidden);
  return sizes;
}

inline LogprobSizes check_linear_token_logprobs(const Tensor& hidden, const Tensor& weight,
                                                const Tensor& ids, const OptionalTensor& bias,
                                                double temperature, int64_t top_n,
                                                int64_t /*ignore_index*/,
                                                const OptionalTensor& allowed) {
  constexpr const char* op = "linear_token_logprobs";
  const LinearSizes sizes = check_linear(op, hidden, weight, bias);
  check_temperature(op, temperature);
  if (allowed) check_allowed(op, *allowed, sizes.vocab, "hidden", hidden);
  return check_logprob_ids(op, ids, "hidden", hidden, sizes.vocab, top_n);
}

inline LinearSizes check_linear_sample_tokens(const Tensor& hidden, const Tensor& weight,
                                              const Tensor& seed, const OptionalTensor& bias,
                                              double temperature, int64_t top_k, double top_p,
                                              double min_p, const OptionalTensor& row_options,
                                              int64_t suppress_token,
                                              const OptionalTensor& allowed) {
  constexpr const char* op = "linear_sample_tokens";
  const LinearSizes sizes = check_linear(op, hidden, weight, bias);
  check_draw(op, "hidden", hidden, sizes.vocab, seed,
             {temperature, static_cast<double>(top_k), top_p, min_p}, row_options, suppress_token,
             allowed);
  return sizes;
}

inline LinearSizes check_linear_passes(const char* op, const OptionalTensor& hidden_masked,
                                       const OptionalTensor& hidden_predicted, const Tensor& weight,
                                       const Tensor& target, const OptionalTensor& bias,
                                       double label_smoothing, double z_loss, double temperature) {
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
  check_loss_options(op, label_smoothing, z_loss, temperature);
  return sizes;
}

inline LinearSizes check_linear_oput_loss(const OptionalTensor& hidden_masked,
                                          const OptionalTensor& hidden_predicted,
                                          const Tensor& weight, const Tensor& target,
                                          const OptionalTensor& bias, int64_t /*ignore_index*/,
                                          double label_smoothing, double z_loss,
                                          double temperature) {
  return check_linear_passes("linear_oput_loss", hidden_masked, hidden_predicted, weight, target,
                             bias, label_smoothing, z_loss, temperature);
}

inline LinearSizes check_linear_oput_loss_backward(
    const Tensor& grad_masked, const Tensor& grad_predicted, const OptionalTensor& hidden_masked,
    const OptionalTensor& hidden_predicted, const Tensor& weight, const Tensor& target,
    const Tensor& logsumexp_masked, const Tensor& logsumexp_predicted, const OptionalTensor& bias,
    int64_t /*ignore_index*/, double label_smoothing, double z_loss, double temperature,
    bool /*needs_masked*/, bool /*needs_predicted*/, bool /*needs_weight*/, bool /*needs_bias*/) {
  constexpr const char* op = "linear_oput_loss_backward";
  const LinearSizes sizes = check_linear_passes(op, hidden_masked, hidden_predicted, weight, target,
                                                bias, label_smoothing, z_loss, temperature);
  const auto check_pass = [&](const OptionalTensor& hidden, const char* grad_name,
                              const Tensor& grad, const char* logsumexp_name,
                              const Tensor& logsumexp) {
    if (!hidden) return;
    check_like_target(op, grad_name, grad, target, "target", target);
    check_like_target(op, logsumexp_name, logsumexp, target, "target", target);
  };
  check_pass(hidden_masked, "grad_masked", grad_masked, "logsumexp_masked", logsumexp_masked);
  check_pass(hidden_predicted, "grad_predicted", grad_predicted, "logsumexp_predicted",
             logsumexp_predicted);
  return sizes;
}

inline LinearSizes check_linear_oput_loss_sum(
    const OptionalTensor& hidden_masked, const OptionalTensor& hidden_predicted,
    const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    const OptionalTensor& factor_masked, const OptionalTensor& factor_predicted,
    int64_t /*ignore_index*/, double label_smoothing, double z_loss, double temperature,
    bool /*needs_masked*/, bool /*needs_predicted*/, bool /*needs_weight*/, bool /*needs_bias*/) {
  constexpr const char* op = "linear_oput_loss_sum";
  const LinearSizes sizes = check_linear_passes(op, hidden_masked, hidden_predicted, weight, target,
                                                bias, label_smoothing, z_loss, temperature);
  if (factor_masked) {
    check_like_target(op, "factor_masked", *factor_masked, target, "target", target);
  }
  if (factor_predicted) {
    check_like_target(op, "factor_predicted", *factor_predicted, target, "target", target);
  }
  return sizes;
}

inline void check_linear_oput_loss_scale_(const Tensor& grad, const Tensor& factor) {
  constexpr const char* op = "linear_oput_loss_scale_";
  check_float(op, "grad", grad);
  check_contiguous(op, "grad", grad);
  check_dtype(op, "factor", factor, ScalarType::Float);
  check_shape(op, "factor", factor, Sizes{}, "one number");
  check_same_device(op, "factor", factor, "grad", grad);
}

}  // namespace dmax
