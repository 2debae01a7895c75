#include "cuda/sample.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

// `seeds` is contiguous
static SampleKey sample_key(const Tensor& seeds, double temperature, int64_t first_id) {
  return {seeds.const_data_ptr<int64_t>(), is_seed_per_row(seeds),
          static_cast<float>(1.0 / temperature), static_cast<uint32_t>(first_id)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens(
    Tensor logits, Tensor seed, double temperature, int64_t top_k, double top_p, double min_p,
    OptionalTensor row_options, int64_t suppress_token, OptionalTensor allowed) {
  check_sample_tokens(logits, seed, temperature, top_k, top_p, min_p, row_options, suppress_token,
                      allowed);
  fail("sample_tokens: this draw is not in the CUDA kernels yet");
}

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
  const RowView rows = row_view(logits_shard);
  if (rows.rows == 0) return {maximum, sum_exp, token, score, weight};
  const Tensor seeds = torch::stable::contiguous(seed);
  const SampleKey key = sample_key(seeds, temperature, vocab_start);
  const SamplePartialFinish finish{
      maximum.mutable_data_ptr<float>(), sum_exp.mutable_data_ptr<float>(),
      token.mutable_data_ptr<int64_t>(), score.mutable_data_ptr<float>(),
      weight.mutable_data_ptr<float>(),  vocab_start};

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto kernel = sample_partial_kernel<T>(vocab_start);
    const LogitsView<T> view = logits_view<T>(rows, sizes.local_suppress, temperature);
    launch_rows<T, SamplePartial>(
        call, logits_shard, {rows.rows, rows.width, kSampleResident}, [&](const RowLaunch& run) {
          return launch(run.shape, call.stream, kernel, view, run.split, key, finish);
        });
  });
  return {maximum, sum_exp, token, score, weight};
}

std::tuple<Tensor, Tensor> sample_merge(Tensor maximum, Tensor sum_exp, Tensor token, Tensor score,
                                        Tensor weight, double temperature) {
  check_sample_merge(maximum, sum_exp, token, score, weight, temperature);
  return merge_shards("sample_merge", maximum, sum_exp, token, score, weight, temperature);
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("sample_tokens", TORCH_BOX(&dmax::cuda::sample_tokens));
  m.impl("sample_partial", TORCH_BOX(&dmax::cuda::sample_partial));
  m.impl("sample_merge", TORCH_BOX(&dmax::cuda::sample_merge));
}
