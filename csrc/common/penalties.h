// The penalties of tokens that have occurred, of a call or of one row: the same on the host and on
// the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/constants.h"

namespace dmax {

DMAX_HOST_DEVICE bool is_finite_number(float x) { return x - x == 0.0f; }

// With its defaults a logit stays as it is
struct Penalties {
  float repetition = 1;
  float presence = 0;
  float frequency = 0;

  DMAX_HOST_DEVICE bool valid() const {
    return repetition > 0 && is_finite_number(repetition) && is_finite_number(presence) &&
           is_finite_number(frequency);
  }

  // Of a token that occurs `count` times in the output, and in the prompt if count is 0
  DMAX_HOST_DEVICE float apply(float x, int32_t count) const {
    x = x > 0 ? x / repetition : x * repetition;
    if (count <= 0) return x;
    const auto times = static_cast<float>(count);
#if defined(__CUDA_ARCH__)
    x = x - __fmul_rn(frequency, times);  // as eager PyTorch rounds it, without a fused product
#else
    x = x - frequency * times;
#endif
    return x - presence;
  }
};

// Row `row` of penalties, float32 [rows, 3]
DMAX_HOST_DEVICE Penalties penalties_of(const float* penalties, int64_t row) {
  const float* of_row = penalties + 3 * row;
  return {of_row[0], of_row[1], of_row[2]};
}

}  // namespace dmax
