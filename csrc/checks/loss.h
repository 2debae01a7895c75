// Ops of the dual-pass loss on stored logits (Eqs. 5-6).
#pragma once

#include "common/memory_overlap.h"

namespace dmax {

inline void check_loss_options(const char* op, double label_smoothing, double z_loss,
                               double temperature) {
  DMAX_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op,
             ": label_smoothing must be in [0, 1], got ", label_smoothing);
  DMAX_CHECK(z_loss >= 0 && std::isfinite(z_loss), op,
             ": z_loss must be zero or positive and finite, got ", z_loss);
  check_temperature(op, temperature);
}

inline void check_target(const char* op, const Tensor& target, const char* logits_name,
                         const Tensor& logits,
                         const char* meaning = "one token per row of logits") {
  check_integer(op, "target", target);
  check_shape(op, "target", target, leading_sizes(logits), meaning);
  check_same_device(op, "target", target, logits_name, logits);
}

// One float32 number per target
inline void check_like_target(const char* op, const char* name, const Tensor& t,
                              const Tensor& target, const char* like_name, const Tensor& like) {
  check_dtype(op, name, t, ScalarType::Float);
  check_shape(op, name, t, target.sizes(), "that of target");
  check_same_device(op, name, t, like_name, like);
}

// Both passes' logits [..., V], either of which may be absent; returns V
inline int64_t check_passes(const char* op, const OptionalTensor& logits_masked,
                            const OptionalTensor& logits_predicted, const Tensor& target,
                            double label_smoothing, double z_loss, double temperature) {
  DMAX_CHECK(logits_masked || logits_predicted, op,
             ": logits_masked or logits_predicted must be given, got neither");
  const char* first_name = logits_masked ? "logits_masked" : "logits_predicted";
  const Tensor& first = logits_masked ? *logits_masked : *logits_predicted;
  const int64_t vocab = check_logits(op, first_name, first);
  if (logits_masked && logits_predicted) {
    check_logits(op, "logits_predicted", *logits_predicted);
    check_shape(op, "logits_predicted", *logits_predicted, logits_masked->sizes(),
                "that of logits_masked");
    check_dtype(op, "logits_predicted", *logits_predicted, logits_masked->scalar_type());
    check_same_device(op, "logits_predicted", *logits_predicted, "logits_masked", *logits_masked);
  }
  check_target(op, target, first_name, first);
  check_loss_options(op, label_smoothing, z_loss, temperature);
  return vocab;
}

inline int64_t check_oput_loss(const OptionalTensor& logits_masked,
                               const OptionalTensor& logits_predicted, const Tensor& target,
                               int64_t /*ignore_index*/, double label_smoothing, double z_loss,
                               double temperature) {
  return check_passes("oput_loss", logits_masked, logits_predicted, target, label_smoothing, z_loss,
                      temperature);
}

inline int64_t check_oput_loss_backward(const Tensor& grad_loss, const Tensor& logits,
                                        const Tensor& target, const Tensor& logsumexp,
                                        int64_t /*ignore_index*/, double label_smoothing,
                                        double z_loss, double temperature) {
  constexpr const char* op = "oput_loss_backward";
  const int64_t vocab = check_logits(op, "logits", logits);
  check_target(op, target, "logits", logits);
  check_like_target(op, "grad_loss", grad_loss, target, "logits", logits);
  check_like_target(op, "logsumexp", logsumexp, target, "logits", logits);
  check_loss_options(op, label_smoothing, z_loss, temperature);
  return vocab;
}

inline int64_t check_oput_loss_and_grad_(const OptionalTensor& logits_masked,
                                         const OptionalTensor& logits_predicted,
                                         const Tensor& target, const OptionalTensor& grad_masked,
                                         const OptionalTensor& grad_predicted,
                                         int64_t /*ignore_index*/, double label_smoothing,
                                         double z_loss, double temperature) {
  constexpr const char* op = "oput_loss_and_grad_";
  const int64_t vocab = check_passes(op, logits_masked, logits_predicted, target, label_smoothing,
                                     z_loss, temperature);
  if (grad_masked) {
    check_like_target(op, "grad_masked", *grad_masked, target, "target", target);
  }
  if (grad_predicted) {
    check_like_target(op, "grad_predicted", *grad_predicted, target, "target", target);
  }
  if (logits_masked) mutable_row_view(op, "logits_masked", *logits_masked);
  if (logits_predicted) mutable_row_view(op, "logits_predicted", *logits_predicted);
  const auto given = [](const OptionalTensor& t) { return t ? &*t : nullptr; };
  check_no_overlap(
      op, {{"logits_masked", given(logits_masked)}, {"logits_predicted", given(logits_predicted)}},
      {{"target", &target},
       {"grad_masked", given(grad_masked)},
       {"grad_predicted", given(grad_predicted)}});
  return vocab;
}

}  // namespace dmax
