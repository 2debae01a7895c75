// Algorithm 1, lines 5-8: the run of masked positions, left to right, that pass the threshold.
#pragma once

#include "cuda/platform.cuh"

namespace dmax::cuda {

// A NaN passes neither way
__device__ __forceinline__ bool passes(float confidence, float threshold, bool inclusive) {
  return inclusive ? confidence >= threshold : confidence > threshold;
}

// Given the first masked position and the first masked one that fails: the positions before the
// failure are promoted, and the first one whatever its confidence, so that every step decodes
__device__ __forceinline__ bool is_promoted(int position, bool masked, int first_masked,
                                            int first_failed) {
  return masked && (position < first_failed || position == first_masked);
}

}  // namespace dmax::cuda
