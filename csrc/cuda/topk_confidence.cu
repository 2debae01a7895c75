#include "cuda/topk_confidence.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

static_assert(kMaxListed == kMaxTopK, "a warp's list holds the largest k");

std::tuple<Tensor, Tensor> topk_confidence(Tensor logits, int64_t k, double temperature,
                                           int64_t suppress_token) {
  const int64_t vocab = check_topk_confidence(logits, k, temperature, suppress_token);
  const Call call("topk_confidence", logits);
  Sizes out = leading_sizes(logits);
  out.push_back(k);
  Tensor tokens = empty_like_device(logits, out, ScalarType::Long);
  Tensor confidences = empty_like_device(logits, out, ScalarType::Float);
  const RowView view = row_view(logits);
  if (view.rows == 0) return {tokens, confidences};

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowLaunch chosen = choose_topk_launch<T>(view.rows, view.width, call.device);
    call.check_blocks(view.rows * chosen.splits);
    const RowScratch scratch(call, logits, chosen);
    const Tensor lists = call.scratch(logits, list_bytes(view.rows, chosen, static_cast<int>(k)));
    const TopkOutput output{tokens.mutable_data_ptr<int64_t>(),
                            confidences.mutable_data_ptr<float>(), static_cast<int>(k)};
    call.check(launch_topk_rows(logits_view<T>(view, suppress_token, temperature), chosen,
                                scratch.split, static_cast<Rank*>(lists.mutable_data_ptr()), output,
                                call.stream));
  });
  return {tokens, confidences};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("topk_confidence", TORCH_BOX(&dmax::cuda::topk_confidence));
}
