// The options of a draw, (temperature, top_k, top_p, min_p) of a call or of one row, and their
// ranges: the same on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/constants.h"

namespace dmax {

// Options are float32, as in row_options; every one of these says false of a NaN

// Between these, the temperature and its inverse are normal float32 numbers, so kernels may
// multiply by the inverse. If it were 0, a logit of -inf would become NaN.
constexpr double kLeastTemperature = 1e-30;
constexpr double kMostTemperature = 1e30;

DMAX_HOST_DEVICE bool is_temperature(double temperature) {
  const float t = static_cast<float>(temperature);
  return t >= static_cast<float>(kLeastTemperature) && t <= static_cast<float>(kMostTemperature);
}
DMAX_HOST_DEVICE bool is_draw_temperature(double temperature) {
  return static_cast<float>(temperature) == 0.0f || is_temperature(temperature);
}
DMAX_HOST_DEVICE bool is_draw_top_k(double top_k) { return top_k >= 0 && top_k == floor(top_k); }
DMAX_HOST_DEVICE bool is_draw_top_p(double top_p) {
  return static_cast<float>(top_p) > 0 && top_p <= 1;
}
DMAX_HOST_DEVICE bool is_draw_min_p(double min_p) { return min_p >= 0 && min_p <= 1; }

// With its defaults a draw filters nothing
struct DrawOptions {
  double temperature = 1;  // 0: greedy
  double top_k = 0;        // a whole number; 0: off
  double top_p = 1;        // 1: off
  double min_p = 0;        // 0: off

  DMAX_HOST_DEVICE bool valid() const {
    return is_draw_temperature(temperature) && is_draw_top_k(top_k) && is_draw_top_p(top_p) &&
           is_draw_min_p(min_p);
  }
  DMAX_HOST_DEVICE bool greedy() const { return temperature == 0; }
  DMAX_HOST_DEVICE bool filters(int64_t vocab) const {
    return (top_k > 0 && top_k < static_cast<double>(vocab)) || top_p < 1 || min_p > 0;
  }
};

// Row `row` of row_options, float32 [rows, 4]
DMAX_HOST_DEVICE DrawOptions draw_options_of(const float* row_options, int64_t row) {
  const float* of_row = row_options + 4 * row;
  return {of_row[0], of_row[1], of_row[2], of_row[3]};
}

// Words of 32 bits in a mask of the vocabulary: bit v % 32 of word v / 32 is set if v is allowed
DMAX_HOST_DEVICE int64_t mask_words(int64_t vocab) { return (vocab + 31) / 32; }

}  // namespace dmax
