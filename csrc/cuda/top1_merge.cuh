// top1_merge: the shards' partial results of a row become its token and confidence.
#pragma once

#include "common/softmax_stats.h"
#include "cuda/platform.cuh"

namespace dmax::cuda {

struct Top1MergeArgs {
  const float* maximum;  // [shards, rows]
  const float* sum_exp;
  const int64_t* token;
  int64_t* merged_token;  // [rows]
  float* confidence;
  int64_t shards, rows;
};

constexpr int kMergeThreads = 128;

// One thread per row; the shards in order, so the sum has the same bits in every launch
__global__ void __launch_bounds__(kMergeThreads)
    top1_merge_kernel(const __grid_constant__ Top1MergeArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (row >= args.rows) return;
  float best = args.maximum[row];
  int64_t token = args.token[row];
  for (int64_t s = 1; s < args.shards; ++s) {
    const float maximum = args.maximum[s * args.rows + row];
    const int64_t candidate = args.token[s * args.rows + row];
    if (ranks_before(maximum, candidate, best, token)) {
      best = maximum;
      token = candidate;
    }
  }
  float total = 0.0f;
  for (int64_t s = 0; s < args.shards; ++s) {
    const float maximum = args.maximum[s * args.rows + row];
    constexpr float kLog2E = 1.4426950408889634f;
    const float weight = maximum == -INFINITY ? 0.0f : exp2_approx((maximum - best) * kLog2E);
    total = fmaf(args.sum_exp[s * args.rows + row], weight, total);
  }
  args.merged_token[row] = token;
  args.confidence[row] = is_finite(best) ? 1.0f / total : NAN;
}

inline LaunchShape choose_top1_merge_launch(int64_t rows) {
  return {static_cast<unsigned>((rows + kMergeThreads - 1) / kMergeThreads), kMergeThreads, 0};
}

inline auto launch_top1_merge(const Top1MergeArgs& args, Stream stream) {
  return launch(choose_top1_merge_launch(args.rows), stream, top1_merge_kernel, args);
}

}  // namespace dmax::cuda
