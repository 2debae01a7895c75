#include "checks/rows.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/sample_rows.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_partial(Tensor logits_shard, Tensor seed,
                                                                  int64_t vocab_start,
                                                                  double temperature,
                                                                  int64_t suppress_token) {
  const auto sizes =
      check_sample_partial(logits_shard, seed, vocab_start, temperature, suppress_token);
  const Sizes out_sizes = leading_sizes(logits_shard);
  Tensor maximum = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor token = empty_like_device(logits_shard, out_sizes, ScalarType::Long);
  Tensor score = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor weight = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  const RowView view = row_view(logits_shard);
  const Tensor seed_c = torch::stable::contiguous(seed);
  const int64_t* seeds = seed_c.const_data_ptr<int64_t>();
  float* maximum_out = maximum.mutable_data_ptr<float>();
  float* sum_exp_out = sum_exp.mutable_data_ptr<float>();
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* score_out = score.mutable_data_ptr<float>();
  float* weight_out = weight.mutable_data_ptr<float>();

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const VocabScan scan{sizes.vocab, sizes.local_suppress, temperature};
    const TileKernels<T>& kernels = tile_kernels<T>();
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t row) { return data + row * view.row_stride; };
    scan_rows<T>(view.rows, scan, row_of, [&](int64_t row, const RowStats& stats) {
      maximum_out[row] = stats.maximum;
      if (!stats.defined()) {  // NaN, +inf or nothing but -inf: the maximum says it all
        const bool empty = stats.maximum == -std::numeric_limits<float>::infinity();
        sum_exp_out[row] = weight_out[row] = empty ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        token_out[row] = vocab_start + stats.token;
        score_out[row] = stats.maximum;
        return;
      }
      const NoiseKey key = noise_key(seeds, is_seed_per_row(seed), row);
      const PerturbedBest best = sample_row(kernels, row_of(row), scan, stats, key, vocab_start);
      const double logit = kernels.value(row_of(row) + (best.id - vocab_start));
      sum_exp_out[row] = static_cast<float>(1.0 + stats.rest);
      token_out[row] = best.id;
      score_out[row] = best.score;
      weight_out[row] = static_cast<float>(std::exp((logit - stats.maximum) / temperature));
    });
  });
  return {maximum, sum_exp, token, score, weight};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("sample_partial", TORCH_BOX(&dmax::cpu::sample_partial));
}
