#include "checks/rows.h"

#include "cpu/shard_rows.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor> sample_merge(Tensor maximum, Tensor sum_exp, Tensor token, Tensor score,
                                        Tensor weight, double temperature) {
  const auto sizes = check_sample_merge(maximum, sum_exp, token, score, weight, temperature);
  const Sizes out_sizes(maximum.sizes().begin() + 1, maximum.sizes().end());
  Tensor sampled = empty_like_device(maximum, out_sizes, ScalarType::Long);
  Tensor probability = empty_like_device(maximum, out_sizes, ScalarType::Float);
  const Tensor maximum_c = torch::stable::contiguous(maximum);
  const Tensor sum_exp_c = torch::stable::contiguous(sum_exp);
  const Tensor token_c = torch::stable::contiguous(token);
  const Tensor score_c = torch::stable::contiguous(score);
  const Tensor weight_c = torch::stable::contiguous(weight);
  const float* scores = score_c.const_data_ptr<float>();
  const float* weights = weight_c.const_data_ptr<float>();
  int64_t* sampled_out = sampled.mutable_data_ptr<int64_t>();
  float* probability_out = probability.mutable_data_ptr<float>();
  const ShardRows shards{sizes.shards,
                         sizes.rows,
                         maximum_c.const_data_ptr<float>(),
                         sum_exp_c.const_data_ptr<float>(),
                         token_c.const_data_ptr<int64_t>(),
                         temperature};
  for_each_merged_row(shards, [&](int64_t row) {
    const int64_t best = shards.winner(scores, row);
    const float maximum = shards.maxima[shards.winner(shards.maxima, row)];
    const double mass = weights[best] * shards.factor(best, maximum);
    sampled_out[row] = shards.tokens[best];
    probability_out[row] = is_finite(maximum)
                               ? static_cast<float>(mass / shards.total(row, maximum))
                               : std::numeric_limits<float>::quiet_NaN();
  });
  return {sampled, probability};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("sample_merge", TORCH_BOX(&dmax::cpu::sample_merge));
}
