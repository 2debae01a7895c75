// linear_top1_confidence and linear_sample_tokens: one token per row, from the hidden states.
#include "cpu/gumbel_race.h"
#include "cpu/linear_stream.h"
#include "cpu/row_stats.h"

namespace dmax::cpu {

namespace {

struct RowSample {
  RowStats stats;
  PerturbedBest best{-std::numeric_limits<float>::infinity(), -1};
  float logit = 0;  // of best.id

  void merge(const RowSample& later, double temperature) {
    stats.merge(later.stats, temperature);
    if (later.best.score > best.score) {  // a tie stays with the lower id
      best = later.best;
      logit = later.logit;
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> linear_top1_confidence(Tensor hidden, Tensor weight, OptionalTensor bias,
                                                  double temperature, int64_t suppress_token) {
  check_linear_top1_confidence(hidden, weight, bias, temperature, suppress_token);
  Tensor token = empty_like_device(hidden, leading_sizes(hidden), ScalarType::Long);
  Tensor confidence = empty_like_device(hidden, leading_sizes(hidden), ScalarType::Float);
  if (token.numel() == 0) return {token, confidence};
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();
  reduce_linear_rows<RowStats>(
      hidden, weight, bias, suppress_token,
      [&](int64_t, RowStats& stats, const TileKernels<float>& kernels, const float* x, int64_t n,
          int64_t first_id) { stats.add(kernels, x, n, first_id, temperature); },
      [&](RowStats& stats, const RowStats& later) { stats.merge(later, temperature); },
      [&](int64_t row, const RowStats& stats) {
        token_out[row] = stats.token;
        confidence_out[row] = stats.confidence();
      });
  return {token, confidence};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_sample_tokens(
    Tensor hidden, Tensor weight, Tensor seed, OptionalTensor bias, double temperature,
    int64_t top_k, double top_p, double min_p, OptionalTensor row_options, int64_t suppress_token,
    OptionalTensor allowed) {
  check_linear_sample_tokens(hidden, weight, seed, bias, temperature, top_k, top_p, min_p,
                             row_options, suppress_token, allowed);
  fail("linear_sample_tokens: this draw is not in the CPU kernels yet");
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("linear_top1_confidence", TORCH_BOX(&dmax::cpu::linear_top1_confidence));
  m.impl("linear_sample_tokens", TORCH_BOX(&dmax::cpu::linear_sample_tokens));
}
