#include "cuda/sample_merge.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

std::tuple<Tensor, Tensor> sample_merge(Tensor maximum, Tensor sum_exp, Tensor token, Tensor score,
                                        Tensor weight, double temperature) {
  const auto sizes = check_sample_merge(maximum, sum_exp, token, score, weight, temperature);
  const Call call("sample_merge", maximum);
  const Sizes out(maximum.sizes().begin() + 1, maximum.sizes().end());
  Tensor sampled = empty_like_device(maximum, out, ScalarType::Long);
  Tensor probability = empty_like_device(maximum, out, ScalarType::Float);
  if (sizes.rows == 0) return {sampled, probability};
  const Tensor maxima = torch::stable::contiguous(maximum);
  const Tensor sums = torch::stable::contiguous(sum_exp);
  const Tensor tokens = torch::stable::contiguous(token);
  const Tensor scores = torch::stable::contiguous(score);
  const Tensor weights = torch::stable::contiguous(weight);
  const ShardRows shards{maxima.const_data_ptr<float>(),
                         sums.const_data_ptr<float>(),
                         tokens.const_data_ptr<int64_t>(),
                         sizes.shards,
                         sizes.rows,
                         softmax_scale(temperature)};
  const SampleMergeArgs args{scores.const_data_ptr<float>(), weights.const_data_ptr<float>(),
                             sampled.mutable_data_ptr<int64_t>(),
                             probability.mutable_data_ptr<float>()};
  call.check(launch_sample_merge(shards, args, call.stream));
  return {sampled, probability};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("sample_merge", TORCH_BOX(&dmax::cuda::sample_merge));
}
