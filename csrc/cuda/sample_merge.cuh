// sample_merge: the shards' partial results of a row become its sampled token and probability.
#pragma once

#include "cuda/shard_rows.cuh"

namespace dmax::cuda {

struct SampleMergeArgs {
  const float* score;  // [shards, rows]
  const float* weight;
  int64_t* token;  // [rows]
  float* probability;
};

__global__ void __launch_bounds__(kMergeThreads)
    sample_merge_kernel(const __grid_constant__ ShardRows shards,
                        const __grid_constant__ SampleMergeArgs args) {
  const int64_t row = merge_thread_row();
  if (row >= shards.rows) return;
  const int64_t winner = shards.winner(args.score, row);
  const float best = shards.maximum[shards.winner(shards.maximum, row)];
  const float mass = args.weight[winner] * shards.factor(winner, best);
  args.token[row] = shards.token[winner];
  args.probability[row] = is_finite(best) ? mass / shards.total(row, best) : NAN;
}

inline auto launch_sample_merge(const ShardRows& shards, const SampleMergeArgs& args,
                                Stream stream) {
  return launch(choose_merge_launch(shards.rows), stream, sample_merge_kernel, shards, args);
}

}  // namespace dmax::cuda
