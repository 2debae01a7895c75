// top1_partial: one vocabulary shard's (maximum, sum of exponentials, global id).
#pragma once

#include "cuda/top1.cuh"

namespace dmax::cuda {

struct Top1PartialFinish {
  float* maximum;
  float* sum_exp;
  int64_t* token;
  int64_t vocab_start;

  __device__ __forceinline__ void operator()(int64_t row, const SoftmaxStats& stats) const {
    maximum[row] = stats.max;
    sum_exp[row] = is_finite(stats.max) ? 1.0f + stats.rest : stats.max == -INFINITY ? 0.0f : NAN;
    token[row] = vocab_start + stats.id;
  }
};

}  // namespace dmax::cuda
