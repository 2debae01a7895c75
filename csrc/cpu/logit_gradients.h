// The gradients of a stacked row's logits, some tokens at a time.
#pragma once

#include <array>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/stacked_passes.h"

namespace dmax::cpu {

inline std::vector<float> widened_bias(const OptionalTensor& bias) {
  if (!bias) return {};
  std::vector<float> wide(bias->numel());
  const Tensor values = as_contiguous(*bias);
  dispatch_float(bias->scalar_type(), [&](auto element) {
    using T = decltype(element);
    tile_kernels<T>().widen(wide.data(), static_cast<const T*>(values.const_data_ptr()),
                            values.numel());
  });
  return wide;
}

// Turns logits of a stacked row into their gradients
class LogitGradients {
 public:
  // Losses without a gradient of their own have 1
  LogitGradients(const StackedRows& stacked, const std::array<OptionalTensor, kPasses>& grad_losses,
                 const std::array<Tensor, kPasses>& log_sums, const Tensor& target_ids,
                 const OptionalTensor& bias, int64_t vocab, const LossOptions& options)
      : rows_(stacked.rows),
        target_ids_(target_ids),
        bias_(widened_bias(bias)),
        vocab_(vocab),
        options_(options) {
    for (int pass = 0; pass < kPasses; ++pass) {
      if (grad_losses[pass]) {  // an expanded 1 has stride 0
        grad_losses_[pass] = as_contiguous(*grad_losses[pass]);
      }
      log_sums_[pass] = as_contiguous(log_sums[pass]);
    }
  }

  // x holds stacked row i's logits for tokens first .. first + n
  void operator()(int64_t i, float* x, int64_t first, int64_t n, bool has_bias) const {
    if (!has_bias && !bias_.empty()) kernels_.add_scaled(x, bias_.data() + first, 1.0f, n);
    const auto [pass, row] = rows_[i];
    const int64_t place = target_ids_.const_data_ptr<int64_t>()[row] - first;
    loss_gradient(kernels_, x, x, n, vocab_, place >= 0 && place < n ? place : -1,
                  log_sums_[pass].const_data_ptr<float>()[row], grad_loss(pass, row), options_);
  }

 private:
  float grad_loss(int pass, int64_t row) const {
    const OptionalTensor& grads = grad_losses_[pass];
    return grads ? grads->const_data_ptr<float>()[row] : 1.0f;
  }

  const TileKernels<float>& kernels_ = tile_kernels<float>();
  const std::vector<StackedRow>& rows_;
  Tensor target_ids_;
  std::vector<float> bias_;
  std::array<OptionalTensor, kPasses> grad_losses_;
  std::array<Tensor, kPasses> log_sums_;
  int64_t vocab_;
  LossOptions options_;
};

}  // namespace dmax::cpu
