#include "checks/linear.h"

#include "cpu/linear_rows.h"

namespace dmax::cpu {

namespace {

struct RowSample {
  OnlineStats stats;
  PerturbedBest best{-std::numeric_limits<float>::infinity(), -1};
  float logit = 0;  // of best.id

  void merge(const RowSample& later, double temperature) {
    stats.merge(later.stats, temperature);
    if (later.best.score > best.score) {  // a tie stays with the lower id
      best = later.best;
      logit = later.logit;
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> linear_sample_tokens(Tensor hidden, Tensor weight, Tensor seed,
                                                OptionalTensor bias, double temperature,
                                                int64_t suppress_token) {
  check_linear_sample_tokens(hidden, weight, seed, bias, temperature, suppress_token);
  Tensor token = empty_like_device(hidden, leading_sizes(hidden), ScalarType::Long);
  Tensor probability = empty_like_device(hidden, leading_sizes(hidden), ScalarType::Float);
  if (token.numel() == 0) return {token, probability};
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* probability_out = probability.mutable_data_ptr<float>();
  const Tensor seed_c = torch::stable::contiguous(seed);
  const int64_t* seeds = seed_c.const_data_ptr<int64_t>();
  const bool seed_per_row = is_seed_per_row(seed);
  const bool greedy = temperature == 0;
  if (greedy) temperature = 1;

  reduce_linear_rows<RowSample>(
      hidden, weight, bias, suppress_token,
      [&](int64_t row, RowSample& sample, const TileKernels<float>& kernels, const float* x,
          int64_t n, int64_t first_id) {
        sample.stats.add(kernels, x, n, first_id, temperature);
        if (greedy) return;
        const int64_t* pair = seeds + (seed_per_row ? 2 * row : 0);
        const NoiseKey key{static_cast<uint64_t>(pair[0]), static_cast<uint64_t>(pair[1]),
                           seed_per_row ? 0u : static_cast<uint32_t>(row)};
        const PerturbedBest best =
            kernels.sample(x, n, first_id, key, static_cast<float>(temperature), sample.best);
        if (best.id != sample.best.id) sample.logit = x[best.id - first_id];
        sample.best = best;
      },
      [&](RowSample& sample, const RowSample& later) { sample.merge(later, temperature); },
      [&](int64_t row, const RowSample& sample) {
        const OnlineStats& stats = sample.stats;
        const bool sampled = !greedy && std::isfinite(stats.maximum);
        token_out[row] = sampled ? sample.best.id : stats.token;
        const double gap = static_cast<double>(sample.logit) - stats.maximum;
        probability_out[row] =
            sampled ? static_cast<float>(std::exp(gap / temperature) / (1.0 + stats.rest))
                    : stats.confidence();
      });
  return {token, probability};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("linear_sample_tokens", TORCH_BOX(&dmax::cpu::linear_sample_tokens));
}
