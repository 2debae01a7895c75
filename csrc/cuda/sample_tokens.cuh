// sample_tokens: the sampled token of every row and its probability.
#pragma once

#include "cuda/sample.cuh"

namespace dmax::cuda {

struct SampleTokensFinish {
  int64_t* token;
  float* probability;

  __device__ __forceinline__ void operator()(int64_t row, const SamplePartial& partial,
                                             float scale) const {
    const bool defined = !partial.broken() && !partial.no_mass();
    token[row] = partial.token();
    probability[row] = defined ? partial.weight(scale) / (1.0f + partial.stats.rest) : NAN;
  }
};

}  // namespace dmax::cuda
