// When a block of spd_step_ has converged, and what it commits then (docs/semantics.md).
#pragma once

namespace dmax {

// The schema's int; the names in the same order are SEMANTICS in dmax_kernels/ops/spd_step.py
enum class Semantics : int {
  kSettled,   // predictions repeat and no mask was left before the step
  kPaper,     // predictions repeat, those at masks included: Algorithm 1, line 12
  kReleased,  // the authors' decode_uniform
};

}  // namespace dmax
