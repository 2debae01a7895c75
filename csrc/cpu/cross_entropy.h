// The loss of one row from its softmax statistics, and its gradient; for stored logits and for
// logits that exist one vocabulary block at a time.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "checks/loss.h"
#include "common/softmax_stats.h"
#include "cpu/simd/tile_kernels.h"

namespace dmax::cpu {

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double temperature;  // the loss is that of logits / temperature
};

// A tensor of zeros on the CPU
inline Tensor zero_floats(const Tensor& like, const Sizes& sizes) {
  Tensor zeros = empty_like_device(like, sizes, ScalarType::Float);
  std::memset(zeros.mutable_data_ptr(), 0, static_cast<size_t>(zeros.numel()) * sizeof(float));
  return zeros;
}

// Targets as int64, each ignore_index or inside the vocabulary
inline Tensor checked_targets(const char* op, const Tensor& target, int64_t vocab,
                              int64_t ignore_index, const char* name = "target") {
  const Tensor wide = as_contiguous(as_long(target));
  const int64_t* data = wide.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < wide.numel(); ++i) {
    DMAX_CHECK(data[i] == ignore_index || (data[i] >= 0 && data[i] < vocab), op, ": ", name,
               " must be ", ignore_index, " (ignore_index) or a token id in [0, ", vocab, "), got ",
               data[i], " at position ", i);
  }
  return wide;
}

// The rows that are not ignored, since nothing is loaded for ignored ones
inline std::vector<int64_t> rows_with_target(const Tensor& target, int64_t ignore_index) {
  const int64_t* data = target.const_data_ptr<int64_t>();
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < target.numel(); ++i) {
    if (data[i] != ignore_index) rows.push_back(i);
  }
  return rows;
}

// (maximum - logit) / temperature + log(sum): each part keeps its precision where the loss is close
// to 0. mean_below_maximum(), maximum - mean(logits), is called only if labels are smoothed.
template <class Mean>
double loss_of_row(double maximum, double log_rest, double target_logit, const LossOptions& options,
                   const Mean& mean_below_maximum) {
  double loss = (maximum - target_logit) / options.temperature + log_rest;
  if (options.label_smoothing != 0) {
    const double smooth = log_rest + mean_below_maximum() / options.temperature;
    loss = (1 - options.label_smoothing) * loss + options.label_smoothing * smooth;
  }
  const double log_sum_exp = maximum / options.temperature + log_rest;
  if (options.z_loss != 0) loss += options.z_loss * log_sum_exp * log_sum_exp;
  return loss;
}

// grad * [(1 + 2 z lse) softmax - (1 - s) onehot(target) - s / V] / temperature over n of V logits,
// with lse that of the logits / temperature; y may be the logits themselves. `place` is the
// target's index among them, or -1 if it is not one of them.
template <class T>
void loss_gradient(const TileKernels<T>& kernels, const T* x, T* y, int64_t n, int64_t vocab,
                   int64_t place, double log_sum_exp, float grad, const LossOptions& options) {
  // A row without a softmax gets NaN throughout, which the loop below would clamp away
  const double mass = std::isnan(log_sum_exp) ? log_sum_exp : 1 + 2 * options.z_loss * log_sum_exp;
  const double shift = -options.label_smoothing / vocab;
  const double logit = place < 0 ? 0 : kernels.value(x + place);
  // Rounding log_sum_exp to float32 changes the softmax by up to 0.4 % (at logits of 65504); this
  // multiplies that factor back in
  const double reference = log_sum_exp * options.temperature;
  const float rounded = static_cast<float>(reference);
  const double outer = grad / options.temperature;
  const double factor = outer * mass * std::exp((rounded - reference) / options.temperature);
  kernels.softmax_grad(x, y, n, rounded, softmax_scale(options.temperature),
                       static_cast<float>(factor), static_cast<float>(outer * shift));
  if (place < 0) return;
  // p - 1 in double, so that the result is rounded only once, to T
  const double at_target = std::exp(logit / options.temperature - log_sum_exp) * mass -
                           (1 - options.label_smoothing) + shift;
  const float at_target_grad = static_cast<float>(outer * at_target);
  kernels.store_scaled(y + place, &at_target_grad, 1.0f, 1);
}

}  // namespace dmax::cpu
