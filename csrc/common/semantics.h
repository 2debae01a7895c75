// The decisions of a decoding step (docs/semantics.md): which masked positions it fills, when a
// block has converged, and what it commits then.
#pragma once

#include "common/constants.h"

namespace dmax {

// The schema's int; the names in the same order are SEMANTICS in dmax_kernels/ops/spd_step.py
enum class Semantics : int {
  kSettled,   // predictions repeat and no mask was left before the step
  kPaper,     // predictions repeat, those at masks included: Algorithm 1, line 12
  kReleased,  // the authors' decode_uniform
};

// A NaN passes neither test, so its position is never filled for its confidence
DMAX_HOST_DEVICE bool passes(float confidence, float threshold, bool inclusive) {
  return inclusive ? confidence >= threshold : confidence > threshold;
}

// Algorithm 1, lines 5-8, from the row's first masked position and its first masked position that
// fails: all masked positions before the failure are promoted, and so is the first masked one,
// whatever its confidence, so that every step decodes something.
DMAX_HOST_DEVICE bool is_promoted(int position, bool masked, int first_masked, int first_failed) {
  return masked && (position < first_failed || position == first_masked);
}

}  // namespace dmax
