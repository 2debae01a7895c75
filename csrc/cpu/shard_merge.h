// The shards' partial results, [shards, rows], and how those of a row are merged; shared by
// top1_merge and sample_merge.
#pragma once

#include <cmath>
#include <limits>

#include "common/softmax_stats.h"
#include "cpu/parallel.h"

namespace dmax::cpu {

struct ShardRows {
  int64_t shards;
  int64_t rows;
  const float* maxima;
  const float* sums;
  const int64_t* tokens;
  double temperature;

  // Index of the row's largest of `values`: a NaN wins, and ties go to the lowest id
  int64_t winner(const float* values, int64_t row) const {
    int64_t best = row;
    for (int64_t s = 1; s < shards; ++s) {
      const int64_t at = s * rows + row;
      if (ranks_before(values[at], tokens[at], values[best], tokens[best])) best = at;
    }
    return best;
  }

  // exp((maximum - best) / temperature), but 0 for a shard without mass, where it could be NaN
  double factor(int64_t at, float best) const {
    if (maxima[at] == -std::numeric_limits<float>::infinity()) return 0;
    return std::exp((static_cast<double>(maxima[at]) - best) / temperature);
  }

  // The row's sum of exponentials, added in shard order
  double total(int64_t row, float best) const {
    double sum = 0;
    for (int64_t s = 0; s < shards; ++s) {
      const double of_shard = factor(s * rows + row, best);
      if (of_shard != 0) sum += sums[s * rows + row] * of_shard;
    }
    return sum;
  }
};

// Calls f(row) for every row, on several threads
template <class F>
void for_each_merged_row(const ShardRows& shards, const F& f) {
  constexpr int64_t kGrain = 4096;
  parallel_for(shards.rows, kGrain / shards.shards, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

}  // namespace dmax::cpu
