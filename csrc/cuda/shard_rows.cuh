// Partial results of a vocabulary's shards, and how a row's become one; one thread per row.
#pragma once

#include "common/softmax_stats.h"
#include "cuda/platform.cuh"

namespace dmax::cuda {

struct ShardRows {
  const float* maximum;  // [shards, rows], as the two below
  const float* sum_exp;
  const int64_t* token;
  int64_t shards, rows;
  float scale;  // log2(e) / temperature

  // Where in the arrays the largest of `values` lies: NaN before all, the lowest id among equals
  __device__ __forceinline__ int64_t winner(const float* values, int64_t row) const {
    int64_t best = row;
    for (int64_t s = 1; s < shards; ++s) {
      const int64_t at = s * rows + row;
      if (ranks_before(values[at], token[at], values[best], token[best])) best = at;
    }
    return best;
  }

  // exp((maximum - best) / temperature); -inf - -inf is NaN, but such a shard holds no mass
  __device__ __forceinline__ float factor(int64_t at, float best) const {
    return maximum[at] == -INFINITY ? 0.0f : exp2_approx((maximum[at] - best) * scale);
  }

  // The shards in order, so the sum has the same bits in every launch
  __device__ __forceinline__ float total(int64_t row, float best) const {
    float sum = 0.0f;
    for (int64_t s = 0; s < shards; ++s)
      sum = fmaf(sum_exp[s * rows + row], factor(s * rows + row, best), sum);
    return sum;
  }
};

constexpr int kMergeThreads = 128;

__device__ __forceinline__ int64_t merge_thread_row() {
  return static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
}

inline LaunchShape choose_merge_launch(int64_t rows) {
  return {static_cast<unsigned>((rows + kMergeThreads - 1) / kMergeThreads), kMergeThreads, 0};
}

}  // namespace dmax::cuda
