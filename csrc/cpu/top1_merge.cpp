#include "ops/top1_merge.h"

#include <cmath>
#include <limits>

#include "cpu/parallel.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor> top1_merge(Tensor maximum, Tensor sum_exp, Tensor token) {
  const auto sizes = check_top1_merge(maximum, sum_exp, token);
  const Sizes out_sizes(maximum.sizes().begin() + 1, maximum.sizes().end());
  Tensor merged = empty_like_device(maximum, out_sizes, ScalarType::Long);
  Tensor confidence = empty_like_device(maximum, out_sizes, ScalarType::Float);
  const Tensor maximum_c = torch::stable::contiguous(maximum);
  const Tensor sum_exp_c = torch::stable::contiguous(sum_exp);
  const Tensor token_c = torch::stable::contiguous(token);
  const float* maxima = maximum_c.const_data_ptr<float>();
  const float* sums = sum_exp_c.const_data_ptr<float>();
  const int64_t* tokens = token_c.const_data_ptr<int64_t>();
  int64_t* merged_out = merged.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();

  constexpr int64_t kGrain = 4096;
  parallel_for(sizes.rows, kGrain / sizes.shards, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      // The winner: NaN before all, then the largest, the lowest id among equals
      int64_t best = row;
      for (int64_t s = 1; s < sizes.shards; ++s) {
        const int64_t at = s * sizes.rows + row;
        const bool nan = std::isnan(maxima[at]);
        const bool best_nan = std::isnan(maxima[best]);
        const bool equal = nan == best_nan && (nan || maxima[at] == maxima[best]);
        const bool above = nan != best_nan ? nan : maxima[at] > maxima[best];
        if (above || (equal && tokens[at] < tokens[best])) best = at;
      }
      // Its mass among all shards, added in the shards' order
      double total = 0;
      for (int64_t s = 0; s < sizes.shards; ++s) {
        const int64_t at = s * sizes.rows + row;
        // exp(-inf - -inf) is NaN, but a shard without mass adds nothing
        if (maxima[at] == -std::numeric_limits<float>::infinity()) continue;
        total += sums[at] * std::exp(static_cast<double>(maxima[at]) - maxima[best]);
      }
      merged_out[row] = tokens[best];
      confidence_out[row] =
          total == 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(1.0 / total);
    }
  });
  return {merged, confidence};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) { m.impl("top1_merge", TORCH_BOX(&dmax::cpu::top1_merge)); }
