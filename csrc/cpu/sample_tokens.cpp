#include "checks/rows.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/sample_rows.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor> sample_tokens(Tensor logits, Tensor seed, double temperature,
                                         int64_t suppress_token) {
  const int64_t vocab = check_sample_tokens(logits, seed, temperature, suppress_token);
  Tensor token = empty_like_device(logits, leading_sizes(logits), ScalarType::Long);
  Tensor probability = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  const RowView view = row_view(logits);
  const Tensor seed_c = torch::stable::contiguous(seed);
  const int64_t* seeds = seed_c.const_data_ptr<int64_t>();
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* probability_out = probability.mutable_data_ptr<float>();
  const bool greedy = temperature == 0;

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const VocabScan scan{vocab, suppress_token, greedy ? 1.0 : temperature};
    const TileKernels<T>& kernels = tile_kernels<T>();
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t row) { return data + row * view.row_stride; };
    scan_rows<T>(view.rows, scan, row_of, [&](int64_t row, const RowStats& stats) {
      token_out[row] = stats.token;
      probability_out[row] = stats.confidence();
      if (greedy || !stats.defined()) return;
      const NoiseKey key = noise_key(seeds, is_seed_per_row(seed), row);
      const int64_t sampled = sample_row(kernels, row_of(row), scan, stats, key).id;
      token_out[row] = sampled;
      probability_out[row] = stats.probability(kernels.value(row_of(row) + sampled), temperature);
    });
  });
  return {token, probability};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&dmax::cpu::sample_tokens));
}
