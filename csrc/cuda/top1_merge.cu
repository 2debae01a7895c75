#include "cuda/top1_merge.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

std::tuple<Tensor, Tensor> top1_merge(Tensor maximum, Tensor sum_exp, Tensor token,
                                      double temperature) {
  const auto sizes = check_top1_merge(maximum, sum_exp, token, temperature);
  const Call call("top1_merge", maximum);
  const Sizes out(maximum.sizes().begin() + 1, maximum.sizes().end());
  Tensor merged_token = empty_like_device(maximum, out, ScalarType::Long);
  Tensor confidence = empty_like_device(maximum, out, ScalarType::Float);
  if (sizes.rows == 0) return {merged_token, confidence};
  const Tensor maxima = torch::stable::contiguous(maximum);
  const Tensor sums = torch::stable::contiguous(sum_exp);
  const Tensor tokens = torch::stable::contiguous(token);
  const ShardRows shards{maxima.const_data_ptr<float>(),
                         sums.const_data_ptr<float>(),
                         tokens.const_data_ptr<int64_t>(),
                         sizes.shards,
                         sizes.rows,
                         softmax_scale(temperature)};
  const Top1MergeOut merged{merged_token.mutable_data_ptr<int64_t>(),
                            confidence.mutable_data_ptr<float>()};
  call.check(launch_top1_merge(shards, merged, call.stream));
  return {merged_token, confidence};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("top1_merge", TORCH_BOX(&dmax::cuda::top1_merge));
}
