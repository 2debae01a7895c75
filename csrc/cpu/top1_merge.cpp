#include "checks/rows.h"

#include "cpu/shard_rows.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor> top1_merge(Tensor maximum, Tensor sum_exp, Tensor token,
                                      double temperature) {
  const auto sizes = check_top1_merge(maximum, sum_exp, token, temperature);
  const Sizes out_sizes(maximum.sizes().begin() + 1, maximum.sizes().end());
  Tensor merged = empty_like_device(maximum, out_sizes, ScalarType::Long);
  Tensor confidence = empty_like_device(maximum, out_sizes, ScalarType::Float);
  const Tensor maximum_c = torch::stable::contiguous(maximum);
  const Tensor sum_exp_c = torch::stable::contiguous(sum_exp);
  const Tensor token_c = torch::stable::contiguous(token);
  int64_t* merged_out = merged.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();

  const ShardRows shards{sizes.shards,
                         sizes.rows,
                         maximum_c.const_data_ptr<float>(),
                         sum_exp_c.const_data_ptr<float>(),
                         token_c.const_data_ptr<int64_t>(),
                         temperature};
  for_each_merged_row(shards, [&](int64_t row) {
    const int64_t best = shards.winner(shards.maxima, row);
    const double total = shards.total(row, shards.maxima[best]);
    merged_out[row] = shards.tokens[best];
    confidence_out[row] =
        total == 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(1.0 / total);
  });
  return {merged, confidence};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) { m.impl("top1_merge", TORCH_BOX(&dmax::cpu::top1_merge)); }
