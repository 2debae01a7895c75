// Cross-entropy of both passes from the hidden states, and the gradients of hidden states and head.
//
// The rows of both passes are stacked, without the ignored ones, so that a block of the weight is
// read (and widened) once for both. Logits exist one block at a time. The backward pass computes
// each block again, which costs one product in four and saves rows x V numbers.
//
// linear_oput_loss_sum knows beforehand how much each row counts and makes the gradients at once.
// It keeps the logits of some rows (KeptLogits) between finding a row's logsumexp and using it:
// three products remain. In bfloat16 they lie in the memory of the weight's gradient, which is
// written after them. If there are more rows, float32 takes them in sweeps, each of which adds to
// the weight's gradient. A 16-bit gradient cannot be added to without rounding it several times, so
// there the logits of the rows that are not kept are computed again.
#include <array>

#include "cpu/cross_entropy.h"
#include "cpu/linear_gradients.h"
#include "cpu/linear_gradients_bfloat16.h"
#include "cpu/linear_stream.h"
#include "cpu/logit_gradients.h"
#include "cpu/row_stats.h"

namespace dmax::cpu {

namespace {

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

  void merge(const LossState& later, double temperature) {
    stats.merge(later.stats, temperature);
    target_logit += later.target_logit;
    logit_sum += later.logit_sum;
  }
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
void add_sweep(Gradients& gradients, const Sweep& sweep, int64_t vocab,
               const LogitGradients& row_gradient) {
  for (int64_t first = 0; first < vocab; first += Gradients::kTokens) {
    gradients.block(sweep, first, std::min(Gradients::kTokens, vocab - first), row_gradient);
  }
}

// f(gradients) fills in `grads` by the products that suit the weight's dtype
template <class F>
void with_gradients(const StackedRows& stacked, const Tensor& weight,
                    const LinearLossGradients& grads, const F& f) {
  const auto fill = [&](auto gradients) {
    f(gradients);
    gradients.finish();
  };
  if (stacked.size() == 0) return;
  if (weight.scalar_type() == ScalarType::BFloat16 && bfloat16_products()) {
    fill(BFloat16Gradients(stacked, weight, grads));
  } else {
    fill(LibraryGradients(stacked, weight, grads));
  }
}

// The arguments that the loss and its gradients share, and the results of the forward pass
struct LossProblem {
  StackedRows stacked;
  const Tensor& weight;
  const OptionalTensor& bias;
  Tensor target_ids;
  LossOptions options;
  std::array<PassResults, kPasses> results;
};

LossProblem loss_problem(const OptionalTensor& hidden_masked,
                         const OptionalTensor& hidden_predicted, const Tensor& weight,
                         const Tensor& target, const OptionalTensor& bias, const Tensor& target_ids,
                         const LossOptions& options) {
  return {stacked_rows(hidden_masked, hidden_predicted, target_ids, options.ignore_index),
          weight,
          bias,
          target_ids,
          options,
          {empty_results(hidden_masked, weight, target),
           empty_results(hidden_predicted, weight, target)}};
}

// Losses and logsumexps of the sweep's rows, and the logits of those that it keeps
void reduce_losses(const LossProblem& problem, const Sweep& sweep) {
  const Tensor& weight = problem.weight;
  const int64_t vocab = weight.size(0);
  const LossOptions& options = problem.options;
  const int64_t* targets = problem.target_ids.const_data_ptr<int64_t>();
  const int64_t block = std::min(sweep.num_rows, kLinearRows);
  Tensor buffer = empty_like_device(weight, {block, weight.size(1)}, weight.scalar_type());
  for (int64_t first_row = sweep.first_row; first_row < sweep.end(); first_row += block) {
    const int64_t m = std::min(block, sweep.end() - first_row);
    gather_rows(problem.stacked, first_row, m, buffer);
    const auto row_of = [&](int64_t i) -> const StackedRow& {
      return problem.stacked.rows[first_row + i];
    };
    reduce_linear_rows<LossState>(
        torch::stable::narrow(buffer, 0, 0, m), weight, problem.bias, -1,
        [&](int64_t i, LossState& state, const TileKernels<float>& kernels, const float* x,
            int64_t n, int64_t first_id) {
          if (i == 0 && sweep.keeps(first_row)) sweep.kept.make_chunk_pages(first_id, n);
          if (sweep.keeps(first_row + i)) {
            sweep.kept.keep(first_row + i - sweep.first_row, first_id, x, n);
          }
          state.stats.add(kernels, x, n, first_id, options.temperature);
          const int64_t place = targets[row_of(i).row] - first_id;
          if (place >= 0 && place < n) state.target_logit = x[place];
          if (options.label_smoothing != 0) state.logit_sum += kernels.sum(x, n, 0.0f);
        },
        [&](LossState& state, const LossState& later) { state.merge(later, options.temperature); },
        [&](int64_t i, const LossState& state) {
          const double maximum = state.stats.maximum;
          const double log_rest = state.stats.log_rest();
          const auto [pass, row] = row_of(i);
          problem.results[pass].loss.mutable_data_ptr<float>()[row] =
              static_cast<float>(loss_of_row(maximum, log_rest, state.target_logit, options,
                                             [&] { return maximum - state.logit_sum / vocab; }));
          problem.results[pass].logsumexp.mutable_data_ptr<float>()[row] =
              static_cast<float>(state.stats.log_sum_exp(options.temperature));
        });
  }
}

// The sweeps' losses and gradients, one sweep after the other
template <class Gradients>
void fill_losses_and_gradients(const LossProblem& problem, const LogitGradients& row_gradient,
                               Gradients& gradients) {
  const int64_t rows = problem.stacked.size(), vocab = problem.weight.size(0);
  Sweep sweep{0, rows, {}};
  if (Gradients::takes_sweeps(problem.weight.scalar_type())) {
    const int64_t most_kept = KeptLogits::most_rows(vocab, problem.weight.size(1));
    const int64_t sweeps = (rows + most_kept - 1) / most_kept;
    sweep.num_rows = (rows + sweeps - 1) / sweeps;
  }
  const int64_t sweep_rows = sweep.num_rows;
  sweep.kept = gradients.kept_logits(sweep_rows);
  for (; sweep.first_row < rows; sweep.first_row += sweep_rows) {
    sweep.num_rows = std::min(sweep_rows, rows - sweep.first_row);
    reduce_losses(problem, sweep);
    add_sweep(gradients, sweep, vocab, row_gradient);
  }
}

// sum of factor * loss over the rows of each pass; factors that are absent are 1
std::array<double, kPasses> weighted_sums(const LossProblem& problem,
                                          const std::array<OptionalTensor, kPasses>& factors) {
  std::array<double, kPasses> sums{};
  for (int pass = 0; pass < kPasses; ++pass) {
    const Tensor& losses = problem.results[pass].loss;
    const float* loss = losses.const_data_ptr<float>();
    OptionalTensor factor;
    if (factors[pass]) factor = as_contiguous(*factors[pass]);
    for (int64_t i = 0; i < losses.numel(); ++i) {
      const double weight = factor ? factor->const_data_ptr<float>()[i] : 1.0;
      sums[pass] += loss[i] * weight;
    }
  }
  return sums;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_oput_loss(
    OptionalTensor hidden_masked, OptionalTensor hidden_predicted, Tensor weight, Tensor target,
    OptionalTensor bias, int64_t ignore_index, double label_smoothing, double z_loss,
    double temperature) {
  constexpr const char* op = "linear_oput_loss";
  const int64_t vocab =
      check_linear_oput_loss(hidden_masked, hidden_predicted, weight, target, bias, ignore_index,
                             label_smoothing, z_loss, temperature)
          .vocab;
  const Tensor ids = checked_targets(op, target, vocab, ignore_index);
  const LossProblem problem =
      loss_problem(hidden_masked, hidden_predicted, weight, target, bias, ids,
                   {ignore_index, label_smoothing, z_loss, temperature});
  reduce_losses(problem, {0, problem.stacked.size(), {}});
  const auto& results = problem.results;
  return {results[0].loss, results[1].loss, results[0].logsumexp, results[1].logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_oput_loss_backward(
    Tensor grad_masked, Tensor grad_predicted, OptionalTensor hidden_masked,
    OptionalTensor hidden_predicted, Tensor weight, Tensor target, Tensor logsumexp_masked,
    Tensor logsumexp_predicted, OptionalTensor bias, int64_t ignore_index, double label_smoothing,
    double z_loss, double temperature, bool needs_masked, bool needs_predicted, bool needs_weight,
    bool needs_bias) {
  constexpr const char* op = "linear_oput_loss_backward";
  const int64_t vocab =
      check_linear_oput_loss_backward(grad_masked, grad_predicted, hidden_masked, hidden_predicted,
                                      weight, target, logsumexp_masked, logsumexp_predicted, bias,
                                      ignore_index, label_smoothing, z_loss, temperature,
                                      needs_masked, needs_predicted, needs_weight, needs_bias)
          .vocab;
  const Tensor ids = checked_targets(op, target, vocab, ignore_index);
  const StackedRows stacked = stacked_rows(hidden_masked, hidden_predicted, ids, ignore_index);
  const bool needs_hidden =
      (needs_masked && hidden_masked) || (needs_predicted && hidden_predicted);
  const LinearLossGradients grads =
      empty_gradients(stacked, weight, needs_hidden, needs_weight, needs_bias && bias);
  const LogitGradients row_gradient(stacked, {grad_masked, grad_predicted},
                                    {logsumexp_masked, logsumexp_predicted}, ids, bias, vocab,
                                    {ignore_index, label_smoothing, z_loss, temperature});
  with_gradients(stacked, weight, grads, [&](auto& gradients) {
    add_sweep(gradients, {0, stacked.size(), {}}, vocab, row_gradient);
  });
  const auto hidden_grads =
      scattered_gradients(stacked, {hidden_masked, hidden_predicted},
                          {needs_masked, needs_predicted}, weight, grads.hidden);
  return {hidden_grads[0], hidden_grads[1], grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_oput_loss_sum(
    OptionalTensor hidden_masked, OptionalTensor hidden_predicted, Tensor weight, Tensor target,
    OptionalTensor bias, OptionalTensor factor_masked, OptionalTensor factor_predicted,
    int64_t ignore_index, double label_smoothing, double z_loss, double temperature,
    bool needs_masked, bool needs_predicted, bool needs_weight, bool needs_bias) {
  constexpr const char* op = "linear_oput_loss_sum";
  const int64_t vocab = check_linear_oput_loss_sum(
                            hidden_masked, hidden_predicted, weight, target, bias, factor_masked,
                            factor_predicted, ignore_index, label_smoothing, z_loss, temperature,
                            needs_masked, needs_predicted, needs_weight, needs_bias)
                            .vocab;
  const Tensor ids = checked_targets(op, target, vocab, ignore_index);
  const LossProblem problem =
      loss_problem(hidden_masked, hidden_predicted, weight, target, bias, ids,
                   {ignore_index, label_smoothing, z_loss, temperature});
  const StackedRows& stacked = problem.stacked;
  const auto& results = problem.results;
  const bool needs_hidden =
      (needs_masked && hidden_masked) || (needs_predicted && hidden_predicted);
  const LinearLossGradients grads =
      empty_gradients(stacked, weight, needs_hidden, needs_weight, needs_bias && bias);
  const std::array<OptionalTensor, kPasses> factors{factor_masked, factor_predicted};
  const LogitGradients row_gradient(stacked, factors, {results[0].logsumexp, results[1].logsumexp},
                                    ids, bias, vocab, problem.options);
  with_gradients(stacked, weight, grads, [&](auto& gradients) {
    fill_losses_and_gradients(problem, row_gradient, gradients);
  });
  const auto hidden_grads =
      scattered_gradients(stacked, {hidden_masked, hidden_predicted},
                          {needs_masked, needs_predicted}, weight, grads.hidden);
  const std::array<double, kPasses> sums = weighted_sums(problem, factors);
  Tensor total = torch::stable::new_zeros(weight, {}, ScalarType::Float);
  *total.mutable_data_ptr<float>() = static_cast<float>(sums[0] + sums[1]);
  Tensor by_pass = torch::stable::new_zeros(weight, {kPasses}, ScalarType::Float);
  for (int pass = 0; pass < kPasses; ++pass) {
    by_pass.mutable_data_ptr<float>()[pass] = static_cast<float>(sums[pass]);
  }
  return {total,           by_pass,         results[0].logsumexp, results[1].logsumexp,
          hidden_grads[0], hidden_grads[1], grads.weight,         grads.bias};
}

// Does nothing if the factor is 1, as it is for loss.backward()
void linear_oput_loss_scale_(Tensor grad, Tensor factor) {
  check_linear_oput_loss_scale_(grad, factor);
  const float by = *factor.const_data_ptr<float>();
  if (by == 1.0f) return;
  dispatch_float(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const TileKernels<T>& kernels = tile_kernels<T>();
    T* data = static_cast<T*>(grad.mutable_data_ptr());
    const int64_t tiles = (grad.numel() + kTile - 1) / kTile;
    parallel_for(tiles, 8, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(kTile);
      for (int64_t tile = begin; tile < end; ++tile) {
        T* x = data + tile * kTile;
        const int64_t n = std::min(kTile, grad.numel() - tile * kTile);
        kernels.widen(wide.data(), x, n);
        kernels.store_scaled(x, wide.data(), by, n);
      }
    });
  });
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("linear_oput_loss", TORCH_BOX(&dmax::cpu::linear_oput_loss));
  m.impl("linear_oput_loss_backward", TORCH_BOX(&dmax::cpu::linear_oput_loss_backward));
  m.impl("linear_oput_loss_sum", TORCH_BOX(&dmax::cpu::linear_oput_loss_sum));
  m.impl("linear_oput_loss_scale_", TORCH_BOX(&dmax::cpu::linear_oput_loss_scale_));
}
