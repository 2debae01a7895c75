#include "cuda/top1_partial.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

std::tuple<Tensor, Tensor, Tensor> top1_partial(Tensor logits_shard, int64_t vocab_start,
                                                double temperature, int64_t suppress_token) {
  const auto sizes = check_top1_partial(logits_shard, vocab_start, temperature, suppress_token);
  const Call call("top1_partial", logits_shard);
  const Sizes out = leading_sizes(logits_shard);
  Tensor maximum = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor token = empty_like_device(logits_shard, out, ScalarType::Long);
  const RowView view = row_view(logits_shard);
  if (view.rows == 0) return {maximum, sum_exp, token};

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowLaunch chosen = choose_top1_launch<T>(view.rows, view.width, call.device);
    call.check_blocks(view.rows * chosen.splits);
    const RowScratch scratch(call, logits_shard, chosen);
    const Top1PartialFinish finish{maximum.mutable_data_ptr<float>(),
                                   sum_exp.mutable_data_ptr<float>(),
                                   token.mutable_data_ptr<int64_t>(), vocab_start};
    call.check(launch_top1_rows(logits_view<T>(view, sizes.local_suppress, temperature), chosen,
                                scratch.split, finish, call.stream));
  });
  return {maximum, sum_exp, token};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("top1_partial", TORCH_BOX(&dmax::cuda::top1_partial));
}
