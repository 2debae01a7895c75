#include "cuda/sample_tokens.cuh"

#include "checks/rows.h"
#include "cuda/host.h"
#include "cuda/top1_confidence.cuh"

namespace dmax::cuda {

std::tuple<Tensor, Tensor> sample_tokens(Tensor logits, Tensor seed, double temperature,
                                         int64_t suppress_token) {
  const int64_t vocab = check_sample_tokens(logits, seed, temperature, suppress_token);
  const Call call("sample_tokens", logits);
  Tensor token = empty_like_device(logits, leading_sizes(logits), ScalarType::Long);
  Tensor probability = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  const RowView view = row_view(logits);
  if (view.rows == 0) return {token, probability};
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* probability_out = probability.mutable_data_ptr<float>();
  const Tensor seeds = torch::stable::contiguous(seed);

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (temperature == 0) {  // greedy: the top-1 at temperature 1
      const RowLaunch chosen = choose_top1_launch<T>(view.rows, view.width, call.device);
      call.check_blocks(view.rows * chosen.splits);
      const RowScratch scratch(call, logits, chosen);
      const Top1ConfidenceFinish finish{token_out, probability_out};
      call.check(launch_top1_rows(logits_view<T>(view, suppress_token, 1.0), chosen, scratch.split,
                                  finish, call.stream));
      return;
    }
    const RowLaunch chosen = choose_sample_launch<T>(view.rows, view.width, call.device);
    call.check_blocks(view.rows * chosen.splits);
    const RowScratch scratch(call, logits, chosen);
    const SampleKey key{seeds.const_data_ptr<int64_t>(), is_seed_per_row(seed),
                        static_cast<float>(1.0 / temperature), 0};
    const SampleTokensFinish finish{token_out, probability_out};
    call.check(
        launch_sample_rows<T, FirstId::kZero>(logits_view<T>(view, suppress_token, temperature),
                                              chosen, scratch.split, key, finish, call.stream));
  });
  return {token, probability};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("sample_tokens", TORCH_BOX(&dmax::cuda::sample_tokens));
}
