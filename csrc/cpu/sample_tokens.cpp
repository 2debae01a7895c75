#include "ops/sample_tokens.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/vocab_stats.h"

namespace dmax::cpu {

namespace {

// The winner of the perturbed logits. The tile with the largest logit goes first: most rows are
// decided there, and the others then need few random numbers.
template <class T>
int64_t sample_row(const TileKernels<T>& kernels, const T* row, const VocabScan& scan,
                   const RowStats& stats, const NoiseKey& key) {
  const float temperature = static_cast<float>(scan.temperature);
  PerturbedBest best{-std::numeric_limits<float>::infinity(), scan.vocab};
  const auto sample_tile = [&](int64_t tile) {
    const int64_t end = std::min(scan.vocab, (tile + 1) * kTile);
    for_each_range(tile * kTile, end, scan.suppress, -1, [&](int64_t from, int64_t to) {
      best = kernels.sample(row + from, to - from, from, key, temperature, best);
    });
  };
  const int64_t first = stats.token / kTile;
  sample_tile(first);
  for (int64_t tile = 0; tile < scan.num_tiles(); ++tile) {
    if (tile != first) sample_tile(tile);
  }
  return best.id;
}

}  // namespace

std::tuple<Tensor, Tensor> sample_tokens(Tensor logits, Tensor seed, double temperature,
                                         int64_t suppress_token) {
  const auto sizes = check_sample_tokens(logits, seed, temperature, suppress_token);
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
    const VocabScan scan{sizes.vocab, suppress_token, greedy ? 1.0 : temperature};
    const TileKernels<T>& kernels = tile_kernels<T>();
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t row) { return data + row * view.row_stride; };
    scan_rows<T>(view.rows, scan, row_of, [&](int64_t row, const RowStats& stats) {
      token_out[row] = stats.token;
      probability_out[row] = stats.confidence();
      if (greedy || std::isnan(stats.rest)) return;
      const int64_t* pair = seeds + (sizes.seed_per_row ? 2 * row : 0);
      const NoiseKey key{static_cast<uint64_t>(pair[0]), static_cast<uint64_t>(pair[1]),
                         sizes.seed_per_row ? 0u : static_cast<uint32_t>(row)};
      const int64_t sampled = sample_row(kernels, row_of(row), scan, stats, key);
      const double logit = kernels.value(row_of(row) + sampled);
      token_out[row] = sampled;
      probability_out[row] = static_cast<float>(
          std::exp((logit - stats.maximum) / scan.temperature) / (1.0 + stats.rest));
    });
  });
  return {token, probability};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&dmax::cpu::sample_tokens));
}
