// sample_partial: one vocabulary shard's part of the race, and of the softmax beside it.
#pragma once

#include "cuda/sample.cuh"

namespace dmax::cuda {

struct SamplePartialFinish {
  float* maximum;
  float* sum_exp;
  int64_t* token;
  float* score;
  float* weight;
  int64_t vocab_start;

  __device__ __forceinline__ void operator()(int64_t row, const SamplePartial& partial,
                                             float scale) const {
    const float max = partial.stats.max;
    const bool defined = !partial.broken() && !partial.no_mass();
    const float undefined = partial.no_mass() ? 0.0f : NAN;
    maximum[row] = max;
    sum_exp[row] = defined ? 1.0f + partial.stats.rest : undefined;
    token[row] = vocab_start + partial.token();
    score[row] = defined ? partial.sample.score : max;
    weight[row] = defined ? partial.weight(scale) : undefined;
  }
};

}  // namespace dmax::cuda
