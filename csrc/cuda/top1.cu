#include "cuda/top1_confidence.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

std::tuple<Tensor, Tensor> top1_confidence(Tensor logits, double temperature,
                                           int64_t suppress_token) {
  const int64_t vocab = check_top1_confidence(logits, temperature, suppress_token);
  const Call call("top1_confidence", logits);
  Tensor token = empty_like_device(logits, leading_sizes(logits), ScalarType::Long);
  Tensor confidence = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  const RowView view = row_view(logits);
  if (view.rows == 0) return {token, confidence};

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowLaunch chosen = choose_top1_launch<T>(view.rows, view.width, call.device);
    call.check_blocks(view.rows * chosen.splits);
    const RowScratch scratch(call, logits, chosen);
    const Top1ConfidenceFinish finish{token.mutable_data_ptr<int64_t>(),
                                      confidence.mutable_data_ptr<float>()};
    call.check(launch_top1_rows(logits_view<T>(view, suppress_token, temperature), chosen,
                                scratch.split, finish, call.stream));
  });
  return {token, confidence};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("top1_confidence", TORCH_BOX(&dmax::cuda::top1_confidence));
}
