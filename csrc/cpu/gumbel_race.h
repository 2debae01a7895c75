// The Gumbel-max race over one row of logits; shared by sample_tokens and sample_partial.
#pragma once

#include "cpu/vocab_scan.h"

namespace dmax::cpu {

// The key of one row's noise; `seeds` holds one (seed, offset), or one per row
inline NoiseKey noise_key(const int64_t* seeds, bool seed_per_row, int64_t row) {
  const int64_t* pair = seeds + (seed_per_row ? 2 * row : 0);
  return {static_cast<uint64_t>(pair[0]), static_cast<uint64_t>(pair[1]),
          seed_per_row ? 0u : static_cast<uint32_t>(row)};
}

// The winner of the perturbed logits, whose ids begin at first_id. The tile with the largest logit
// goes first: it decides most rows, and the other tiles then need few random numbers.
template <class T>
PerturbedBest sample_row(const TileKernels<T>& kernels, const T* row, const VocabScan& scan,
                         const RowStats& stats, const NoiseKey& key, int64_t first_id = 0) {
  const float temperature = static_cast<float>(scan.temperature);
  PerturbedBest best{-std::numeric_limits<float>::infinity(), first_id + scan.vocab};
  const auto sample_tile = [&](int64_t tile) {
    const int64_t end = std::min(scan.vocab, (tile + 1) * kTile);
    for_each_range(tile * kTile, end, scan.suppress, -1, [&](int64_t from, int64_t to) {
      best = kernels.sample(row + from, to - from, first_id + from, key, temperature, best);
    });
  };
  const int64_t first = stats.token / kTile;
  sample_tile(first);
  for (int64_t tile = 0; tile < scan.num_tiles(); ++tile) {
    if (tile != first) sample_tile(tile);
  }
  return best;
}

}  // namespace dmax::cpu
