// Algorithm 1, lines 5-8, for one block; shared by prefix_promote and spd_step_.
#pragma once

#include <cstdint>

#include "common/semantics.h"

namespace dmax::cpu {

inline void promote_prefix(const float* confidence, const bool* masked, int64_t block,
                           float threshold, bool inclusive, bool* promoted) {
  bool open = true;   // no masked position has failed yet
  bool first = true;  // no masked position has been seen yet
  for (int64_t j = 0; j < block; ++j) {
    promoted[j] = false;
    if (!masked[j]) continue;
    open = open && passes(confidence[j], threshold, inclusive);
    promoted[j] = open || first;  // the first one always: decoding must advance
    first = false;
  }
}

}  // namespace dmax::cpu
