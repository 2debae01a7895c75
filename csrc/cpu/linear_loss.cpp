// Cross-entropy of both passes from the hidden states, and the gradients of hidden states and head.
//
// The rows of both passes are stacked, without the ignored ones, so that a block of the weight is
// read (and widened) once for both. Logits exist one block at a time. The backward pass computes
// each block again, which costs one product in four and saves rows x V numbers.
#include <array>

#include "cpu/cross_entropy.h"
#include "cpu/linear_gradients.h"
#include "cpu/linear_gradients_amx.h"
#include "cpu/linear_stream.h"
#include "cpu/row_stats.h"

namespace dmax::cpu {

namespace {

std::vector<float> widened_bias(const OptionalTensor& bias) {
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

struct PassResults {
  Tensor loss;
  Tensor logsumexp;
};

PassResults empty_results(const OptionalTensor& hidden, const Tensor& weight,
                          const Tensor& target) {
  const Sizes sizes = hidden ? sizes_of(target) : Sizes{0};
  return {torch::stable::new_zeros(weight, sizes, ScalarType::Float),
          torch::stable::new_zeros(weight, sizes, ScalarType::Float)};
}

// What the forward pass keeps about the tokens of a row that it has seen
struct LossState {
  RowStats stats;
  float target_logit = 0;  // set in the one group that holds the target
  double logit_sum = 0;    // used only if labels are smoothed

  void merge(const LossState& later) {
    stats.merge(later.stats, 1.0);
    target_logit += later.target_logit;
    logit_sum += later.logit_sum;
  }
};

// Turns logits of a stacked row into their gradients
class LogitGradients {
 public:
  LogitGradients(const StackedRows& stacked, const std::array<Tensor, kPasses>& grad_losses,
                 const std::array<Tensor, kPasses>& log_sums, const Tensor& target_ids,
                 const OptionalTensor& bias, int64_t vocab, const LossOptions& options)
      : rows_(stacked.rows),
        target_ids_(target_ids),
        bias_(widened_bias(bias)),
        vocab_(vocab),
        options_(options) {
    for (int pass = 0; pass < kPasses; ++pass) {
      grad_losses_[pass] = as_contiguous(grad_losses[pass]);  // an expanded 1 has stride 0
      log_sums_[pass] = as_contiguous(log_sums[pass]);
    }
  }

  // x holds stacked row i's logits, without their bias, for tokens first .. first + n
  void operator()(int64_t i, float* x, int64_t first, int64_t n) const {
    if (!bias_.empty()) kernels_.add_scaled(x, bias_.data() + first, 1.0f, n);
    const auto [pass, row] = rows_[i];
    const int64_t place = target_ids_.const_data_ptr<int64_t>()[row] - first;
    loss_gradient(kernels_, x, x, n, vocab_, place >= 0 && place < n ? place : -1,
                  log_sums_[pass].const_data_ptr<float>()[row],
                  grad_losses_[pass].const_data_ptr<float>()[row], options_);
  }

 private:
  const TileKernels<float>& kernels_ = tile_kernels<float>();
  const std::vector<StackedRow>& rows_;
  Tensor target_ids_;
  std::vector<float> bias_;
  std::array<Tensor, kPasses> grad_losses_;
  std::array<Tensor, kPasses> log_sums_;
  int64_t vocab_;
  LossOptions options_;
};

// Memory for the gradients that are needed. fill_gradients() writes every element, unless no row
// has a target: then all are 0.
LinearLossGradients empty_gradients(const StackedRows& stacked, const Tensor& weight,
                                    bool needs_hidden, bool needs_weight, bool needs_bias) {
  const int64_t vocab = weight.size(0), dim = weight.size(1);
  LinearLossGradients grads{
      empty_like_device(weight, {needs_hidden ? stacked.size() : 0, dim}, ScalarType::Float),
      empty_like_device(weight, needs_weight ? Sizes{vocab, dim} : Sizes{0}, weight.scalar_type()),
      torch::stable::new_zeros(weight, {needs_bias ? vocab : 0}, weight.scalar_type())};
  if (stacked.size() == 0) torch::stable::zero_(grads.weight);
  return grads;
}

template <class Gradients>
void fill_gradients(const StackedRows& stacked, const Tensor& weight,
                    const LogitGradients& row_gradient, const LinearLossGradients& grads) {
  if (stacked.size() == 0) return;
  const int64_t vocab = weight.size(0);
  Gradients gradients(stacked, weight, grads);
  for (int64_t first = 0; first < vocab; first += Gradients::kTokens) {
    gradients.block(first, std::min(Gradients::kTokens, vocab - first), row_gradient);
  }
  gradients.finish();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_oput_loss(
    OptionalTensor hidden_masked, OptionalTensor hidden_predicted, Tensor weight, Tensor target,
    OptionalTensor bias, int64_t ignore_index, double label_smoothing, double z_loss) {
  constexpr const char* op = "linear_oput_loss";
  const LinearSizes sizes = check_linear_oput_loss(hidden_masked, hidden_predicted, weight, target,
                                                   bias, ignore_index, label_smoothing, z_loss);
  const Tensor ids = checked_targets(op, target, sizes.vocab, ignore_index);
  const int64_t* targets = ids.const_data_ptr<int64_t>();
  const LossOptions options{ignore_index, label_smoothing, z_loss};
  const std::array<PassResults, kPasses> results{empty_results(hidden_masked, weight, target),
                                                 empty_results(hidden_predicted, weight, target)};
  const StackedRows stacked = stacked_rows(hidden_masked, hidden_predicted, ids, ignore_index);
  const int64_t block = std::min(stacked.size(), kLinearRows);
  Tensor buffer = empty_like_device(weight, {block, sizes.dim}, weight.scalar_type());
  for (int64_t first_row = 0; first_row < stacked.size(); first_row += block) {
    const int64_t m = std::min(block, stacked.size() - first_row);
    gather_rows(stacked, first_row, m, buffer);
    const auto row_of = [&](int64_t i) -> const StackedRow& { return stacked.rows[first_row + i]; };
    reduce_linear_rows<LossState>(
        torch::stable::narrow(buffer, 0, 0, m), weight, bias, -1,
        [&](int64_t i, LossState& state, const TileKernels<float>& kernels, const float* x,
            int64_t n, int64_t first_id) {
          state.stats.add(kernels, x, n, first_id, 1.0);
          const int64_t place = targets[row_of(i).row] - first_id;
          if (place >= 0 && place < n) state.target_logit = x[place];
          if (label_smoothing != 0) state.logit_sum += kernels.sum(x, n, 0.0f);
        },
        [](LossState& state, const LossState& later) { state.merge(later); },
        [&](int64_t i, const LossState& state) {
          const double maximum = state.stats.maximum;
          const double log_rest = state.stats.log_rest();
          const auto [pass, row] = row_of(i);
          results[pass].loss.mutable_data_ptr<float>()[row] =
              static_cast<float>(loss_of_row(maximum, log_rest, state.target_logit, options, [&] {
                return maximum - state.logit_sum / sizes.vocab;
              }));
          results[pass].logsumexp.mutable_data_ptr<float>()[row] =
              static_cast<float>(maximum + log_rest);
        });
  }
  return {results[0].loss, results[1].loss, results[0].logsumexp, results[1].logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_oput_loss_backward(
    Tensor grad_masked, Tensor grad_predicted, OptionalTensor hidden_masked,
    OptionalTensor hidden_predicted, Tensor weight, Tensor target, Tensor logsumexp_masked,
    Tensor logsumexp_predicted, OptionalTensor bias, int64_t ignore_index, double label_smoothing,
    double z_loss, bool needs_masked, bool needs_predicted, bool needs_weight, bool needs_bias) {
  constexpr const char* op = "linear_oput_loss_backward";
  const int64_t vocab =
      check_linear_oput_loss_backward(grad_masked, grad_predicted, hidden_masked, hidden_predicted,
                                      weight, target, logsumexp_masked, logsumexp_predicted, bias,
                                      ignore_index, label_smoothing, z_loss, needs_masked,
                                      needs_predicted, needs_weight, needs_bias)
          .vocab;
  const Tensor ids = checked_targets(op, target, vocab, ignore_index);
  const StackedRows stacked = stacked_rows(hidden_masked, hidden_predicted, ids, ignore_index);
  const bool needs_hidden =
      (needs_masked && hidden_masked) || (needs_predicted && hidden_predicted);
  const LinearLossGradients grads =
      empty_gradients(stacked, weight, needs_hidden, needs_weight, needs_bias && bias);
  const LogitGradients row_gradient(stacked, {grad_masked, grad_predicted},
                                    {logsumexp_masked, logsumexp_predicted}, ids, bias, vocab,
                                    {ignore_index, label_smoothing, z_loss});
  if (weight.scalar_type() == ScalarType::BFloat16 && amx_products()) {
    fill_gradients<AmxGradients>(stacked, weight, row_gradient, grads);
  } else {
    fill_gradients<LibraryGradients>(stacked, weight, row_gradient, grads);
  }
  const auto hidden_grads =
      scattered_gradients(stacked, {hidden_masked, hidden_predicted},
                          {needs_masked, needs_predicted}, weight, grads.hidden);
  return {hidden_grads[0], hidden_grads[1], grads.weight, grads.bias};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("linear_oput_loss", TORCH_BOX(&dmax::cpu::linear_oput_loss));
  m.impl("linear_oput_loss_backward", TORCH_BOX(&dmax::cpu::linear_oput_loss_backward));
}
