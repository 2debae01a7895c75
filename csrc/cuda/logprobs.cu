#include "cuda/logprobs.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor ids,
                                                                  double temperature, int64_t top_n,
                                                                  int64_t ignore_index,
                                                                  OptionalTensor allowed) {
  const LogprobSizes sizes =
      check_token_logprobs(logits, ids, temperature, top_n, ignore_index, allowed);
  const Call call("token_logprobs", logits);
  Sizes list_sizes = leading_sizes(logits);
  list_sizes.push_back(top_n);
  Tensor logprob = empty_like_device(logits, sizes_of(ids), ScalarType::Float);
  Tensor rank = empty_like_device(logits, sizes_of(ids), ScalarType::Long);
  Tensor top_ids = empty_like_device(logits, list_sizes, ScalarType::Long);
  Tensor top_logprobs = empty_like_device(logits, list_sizes, ScalarType::Float);
  Tensor logsumexp = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  const RowView rows = row_view(logits);
  if (rows.rows == 0) return {logprob, rank, top_ids, top_logprobs, logsumexp};
  const Tensor tokens = torch::stable::contiguous(ids);
  const RowTokens row_tokens{{tokens.const_data_ptr(), tokens.scalar_type() == ScalarType::Long},
                             static_cast<int>(sizes.ids_per_row),
                             ignore_index};
  const LogprobsOutput out{
      logprob.mutable_data_ptr<float>(),    rank.mutable_data_ptr<int64_t>(),
      top_ids.mutable_data_ptr<int64_t>(),  top_logprobs.mutable_data_ptr<float>(),
      logsumexp.mutable_data_ptr<float>(),  static_cast<int>(top_n),
      static_cast<float>(1.0 / temperature)};
  const Mask mask(allowed, rows.width);

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_rows<T, Top1Partial>(
        call, logits, {rows.rows, rows.width, logprobs_resident(out.top_n)},
        [&](const RowLaunch& run) {
          const size_t count = count_bytes(run, rows.rows, sizes.ids_per_row);
          Tensor counts = call.scratch(logits, count);
          Tensor lists = call.scratch(logits, list_bytes(run, out.top_n));
          return with_mask(
              logits_view<T>(rows, -1, temperature), mask.input(), [&](const auto& view) {
                return launch_token_logprobs(
                    run, view, row_tokens, static_cast<float*>(counts.mutable_data_ptr()),
                    static_cast<Rank*>(lists.mutable_data_ptr()), out, call.stream);
              });
        });
  });
  return {logprob, rank, top_ids, top_logprobs, logsumexp};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("token_logprobs", TORCH_BOX(&dmax::cuda::token_logprobs));
}
