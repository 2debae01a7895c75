#include "cuda/sample_partial.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_partial(Tensor logits_shard, Tensor seed,
                                                                  int64_t vocab_start,
                                                                  double temperature,
                                                                  int64_t suppress_token) {
  const auto sizes =
      check_sample_partial(logits_shard, seed, vocab_start, temperature, suppress_token);
  const Call call("sample_partial", logits_shard);
  const Sizes out = leading_sizes(logits_shard);
  Tensor maximum = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor token = empty_like_device(logits_shard, out, ScalarType::Long);
  Tensor score = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor weight = empty_like_device(logits_shard, out, ScalarType::Float);
  const RowView view = row_view(logits_shard);
  if (view.rows == 0) return {maximum, sum_exp, token, score, weight};
  const Tensor seeds = torch::stable::contiguous(seed);

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowLaunch chosen = choose_sample_launch<T>(view.rows, view.width, call.device);
    call.check_blocks(view.rows * chosen.splits);
    const RowScratch scratch(call, logits_shard, chosen);
    const LogitsView<T> logits = logits_view<T>(view, sizes.local_suppress, temperature);
    const SampleKey key{seeds.const_data_ptr<int64_t>(), is_seed_per_row(seed),
                        static_cast<float>(1.0 / temperature), static_cast<uint32_t>(vocab_start)};
    const SamplePartialFinish finish{
        maximum.mutable_data_ptr<float>(), sum_exp.mutable_data_ptr<float>(),
        token.mutable_data_ptr<int64_t>(), score.mutable_data_ptr<float>(),
        weight.mutable_data_ptr<float>(),  vocab_start};
    call.check(vocab_start % 4 == 0 ? launch_sample_rows<T, FirstId::kMultipleOf4>(
                                          logits, chosen, scratch.split, key, finish, call.stream)
                                    : launch_sample_rows<T, FirstId::kAny>(
                                          logits, chosen, scratch.split, key, finish, call.stream));
  });
  return {maximum, sum_exp, token, score, weight};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("sample_partial", TORCH_BOX(&dmax::cuda::sample_partial));
}
