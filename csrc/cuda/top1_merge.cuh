// top1_merge: the shards' partial results of a row become its token and confidence.
#pragma once

#include "cuda/shard_rows.cuh"

namespace dmax::cuda {

struct Top1MergeOut {
  int64_t* token;  // [rows]
  float* confidence;
};

__global__ void __launch_bounds__(kMergeThreads)
    top1_merge_kernel(const __grid_constant__ ShardRows shards,
                      const __grid_constant__ Top1MergeOut out) {
  const int64_t row = merge_thread_row();
  if (row >= shards.rows) return;
  const int64_t winner = shards.winner(shards.maximum, row);
  const float best = shards.maximum[winner];
  out.token[row] = shards.token[winner];
  out.confidence[row] = is_finite(best) ? 1.0f / shards.total(row, best) : NAN;
}

inline auto launch_top1_merge(const ShardRows& shards, const Top1MergeOut& out, Stream stream) {
  return launch(choose_merge_launch(shards.rows), stream, top1_merge_kernel, shards, out);
}

}  // namespace dmax::cuda
