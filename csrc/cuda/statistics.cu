#include "cuda/statistics.cuh"

#include "checks/rows.h"
#include "cuda/host.h"

namespace dmax::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_statistics(Tensor logits, double temperature,
                                                                  OptionalTensor temperatures,
                                                                  int64_t suppress_token,
                                                                  OptionalTensor allowed) {
  check_row_statistics(logits, temperature, temperatures, suppress_token, allowed);
  const Call call("row_statistics", logits);
  const Sizes out_sizes = leading_sizes(logits);
  Tensor token = empty_like_device(logits, out_sizes, ScalarType::Long);
  Tensor confidence = empty_like_device(logits, out_sizes, ScalarType::Float);
  Tensor runner_up = empty_like_device(logits, out_sizes, ScalarType::Float);
  Tensor entropy = empty_like_device(logits, out_sizes, ScalarType::Float);
  Tensor logsumexp = empty_like_device(logits, out_sizes, ScalarType::Float);
  const RowView rows = row_view(logits);
  if (rows.rows == 0) return {token, confidence, runner_up, entropy, logsumexp};
  const RowStatisticsOutput out{
      token.mutable_data_ptr<int64_t>(), confidence.mutable_data_ptr<float>(),
      runner_up.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(),
      logsumexp.mutable_data_ptr<float>()};
  const Mask mask(allowed, rows.width);
  OptionalTensor packed;
  if (temperatures) packed = as_contiguous(*temperatures);
  const float* of_rows = packed ? packed->const_data_ptr<float>() : nullptr;

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowWork work =
        statistics_work(rows.rows, rows.width, bool(mask), temperatures.has_value());
    launch_rows<T, StatisticsPartial>(call, logits, work, [&](const RowLaunch& run) {
      return with_mask(
          logits_view<T>(rows, suppress_token, temperature), mask.input(), [&](const auto& view) {
            return launch_row_statistics(run, view, temperature, of_rows, out, call.stream);
          });
    });
  });
  return {token, confidence, runner_up, entropy, logsumexp};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("row_statistics", TORCH_BOX(&dmax::cuda::row_statistics));
}
