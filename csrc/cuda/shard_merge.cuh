// The merge of a sharded vocabulary's partial results: top1_merge and sample_merge.
#pragma once

#include "cuda/rows.cuh"

namespace dmax::cuda {

// Partial results of a vocabulary's shards, [shards, rows] each
struct ShardRows {
  const float* maximum;
  const float* sum_exp;
  const int64_t* token;
  const float* score;   // of the samples; null: the likeliest token wins
  const float* weight;  // exp((sample's logit - maximum) / temperature); null if score is
  int64_t shards, rows;
  float scale;  // log2(e) / temperature

  // Index of the row's largest of `values`: a NaN before all, the lowest token among equals
  __device__ __forceinline__ int64_t winner(const float* values, int64_t row) const {
    int64_t best = row;
    for (int64_t s = 1; s < shards; ++s) {
      const int64_t at = s * rows + row;
      if (ranks_before(values[at], token[at], values[best], token[best])) best = at;
    }
    return best;
  }

  // exp((maximum - best) / temperature). For a shard of nothing but -inf that may be
  // -inf - -inf = NaN, but such a shard holds no mass.
  __device__ __forceinline__ float factor(int64_t at, float best) const {
    return maximum[at] == -INFINITY ? 0.0f : exp2_approx((maximum[at] - best) * scale);
  }

  // Adds the shards in order, which gives the sum the same bits in every launch
  __device__ __forceinline__ float total(int64_t row, float best) const {
    float sum = 0.0f;
    for (int64_t s = 0; s < shards; ++s)
      sum = fmaf(sum_exp[s * rows + row], factor(s * rows + row, best), sum);
    return sum;
  }
};

constexpr int kMergeWarps = 4;

// One thread per row
__global__ void __launch_bounds__(kMergeWarps* kWarpSize)
    merge_shards_kernel(const __grid_constant__ ShardRows shards, int64_t* token,
                        float* probability) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeWarps * kWarpSize + threadIdx.x;
  if (row >= shards.rows) return;
  const int64_t likeliest = shards.winner(shards.maximum, row);
  const float best = shards.maximum[likeliest];
  int64_t winner = likeliest;
  float mass = 1.0f;
  if (shards.score != nullptr) {
    winner = shards.winner(shards.score, row);
    mass = shards.weight[winner] * shards.factor(winner, best);
  }
  token[row] = shards.token[winner];
  probability[row] = is_finite(best) ? mass / shards.total(row, best) : NAN;
}

inline LaunchShape merge_shape(int64_t rows) {
  return warps_shape((rows + kWarpSize - 1) / kWarpSize, kMergeWarps);
}

}  // namespace dmax::cuda
