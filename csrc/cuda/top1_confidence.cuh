// top1_confidence: token and softmax(logits / temperature)[token] of every row.
#pragma once

#include "cuda/top1.cuh"

namespace dmax::cuda {

struct Top1ConfidenceFinish {
  int64_t* token;
  float* confidence;

  __device__ __forceinline__ void operator()(int64_t row, const SoftmaxStats& stats) const {
    token[row] = stats.id;
    confidence[row] = top1_probability(stats);
  }
};

}  // namespace dmax::cuda
