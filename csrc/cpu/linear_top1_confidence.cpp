#include "checks/linear.h"

#include "cpu/linear_rows.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor> linear_top1_confidence(Tensor hidden, Tensor weight, OptionalTensor bias,
                                                  double temperature, int64_t suppress_token) {
  check_linear_top1_confidence(hidden, weight, bias, temperature, suppress_token);
  Tensor token = empty_like_device(hidden, leading_sizes(hidden), ScalarType::Long);
  Tensor confidence = empty_like_device(hidden, leading_sizes(hidden), ScalarType::Float);
  if (token.numel() == 0) return {token, confidence};
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();
  reduce_linear_rows<OnlineStats>(
      hidden, weight, bias, suppress_token,
      [&](int64_t, OnlineStats& stats, const TileKernels<float>& kernels, const float* x, int64_t n,
          int64_t first_id) { stats.add(kernels, x, n, first_id, temperature); },
      [&](OnlineStats& stats, const OnlineStats& later) { stats.merge(later, temperature); },
      [&](int64_t row, const OnlineStats& stats) {
        token_out[row] = stats.token;
        confidence_out[row] = stats.confidence();
      });
  return {token, confidence};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("linear_top1_confidence", TORCH_BOX(&dmax::cpu::linear_top1_confidence));
}
