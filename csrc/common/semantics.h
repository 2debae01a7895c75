// The decisions of a decoding step (docs/semantics.md): which masked positions it fills, when a
// block has converged, and what it commits then.
#pragma once

#include <cstdint>
#include <cstring>

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

// ---- edit_step_ ----

// The schema's int; the names in the same order are EDIT_RULES in dmax_kernels/ops/edit_step.py
enum class EditRule : int {
  kThreshold,        // SGLang's LowConfidence
  kLowConfidence,    // no threshold: the most confident positions alone
  kJointThreshold,   // kThreshold, and tokens may change: SGLang's JointThreshold
  kDinferThreshold,  // dInfer's threshold decoder
};

// A predicted mask token fills nothing. SGLang counts it as a fill all the same, dInfer does not.
DMAX_HOST_DEVICE bool may_fill(EditRule rule, bool masked, int64_t prediction,
                               int64_t mask_token_id) {
  return masked && !(rule == EditRule::kDinferThreshold && prediction == mask_token_id);
}

// Whether a position is filled for its confidence, however many others are. `best` is the largest
// confidence of the row's positions that may be filled, and not a NaN if one of them is a number.
DMAX_HOST_DEVICE bool fills(EditRule rule, float confidence, float threshold, float best) {
  if (rule == EditRule::kLowConfidence) return false;
  if (rule != EditRule::kDinferThreshold) return passes(confidence, threshold, false);
  const float near_best = best - 1e-5f;  // dInfer's margin, in float32 as there
  return passes(confidence, near_best < threshold ? near_best : threshold, true);
}

// Orders positions by confidence, the leftmost first among equals and NaN last. A probability's
// bits grow with it. Keys are never 0, and those of NaN positions are below kLeastNumberKey.
constexpr uint64_t kLeastNumberKey = uint64_t{1} << 32;

DMAX_HOST_DEVICE uint64_t order_key(float confidence, int position) {
  uint32_t bits = 0;
  if (confidence == confidence) {
    memcpy(&bits, &confidence, sizeof(bits));
    bits += 1;
  }
  return uint64_t{bits} << 32 | (0xffffffffu - static_cast<uint32_t>(position));
}

DMAX_HOST_DEVICE float confidence_of_key(uint64_t key) {
  const auto bits = static_cast<uint32_t>(key >> 32) - 1;  // a NaN's pattern for a NaN
  float confidence;
  memcpy(&confidence, &bits, sizeof(bits));
  return confidence;
}

// A row is done in the step that changes nothing: the forward pass before that step has already
// put the block's final tokens through the model. `post_edit_steps` counts this step.
DMAX_HOST_DEVICE bool is_spent(bool any_masked, int post_edit_steps, int max_post_edit_steps) {
  return !any_masked && post_edit_steps > max_post_edit_steps;
}

}  // namespace dmax
