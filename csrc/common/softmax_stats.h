// (maximum, sum of exponentials, id) of part of a row, and how two parts become one: the same rules
// on the host and on the device, for warps, splits and shards.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/constants.h"

namespace dmax {

struct SoftmaxStats {
  float max;
  // Sum of exp((x - max) / temperature) over all elements but the one at max, whose term is 1.
  // Leaving it out keeps the precision of a probability close to 1 and of a loss close to 0. NaN if
  // an element is.
  float rest;
  int32_t id;  // first element that equals max; if max is NaN, the first NaN
};

constexpr int32_t kNoId = 0x7fffffff;

DMAX_HOST_DEVICE SoftmaxStats empty_stats() { return {-INFINITY, 0.0f, kNoId}; }

// The first NaN wins; without one, the larger value; ties go to the lowest id
template <class Id>
DMAX_HOST_DEVICE bool ranks_before(float value_a, Id id_a, float value_b, Id id_b) {
  const bool nan_a = value_a != value_a;
  const bool nan_b = value_b != value_b;
  if (nan_a || nan_b) return nan_a && (!nan_b || id_a < id_b);
  return value_a > value_b || (value_a == value_b && id_a < id_b);
}

// `decay(d)` is exp(d / temperature) for d <= 0. Symmetric in a and b to the last bit: the part
// with the maximum keeps its rest as it is, and fmaf leaves the compiler no choice of rounding.
template <class Decay>
DMAX_HOST_DEVICE SoftmaxStats merge_stats(const SoftmaxStats& a, const SoftmaxStats& b,
                                          const Decay& decay) {
  const bool a_first = ranks_before(a.max, a.id, b.max, b.id);
  // Selected value by value: a reference to a or b would put both into local memory
  const float top_max = a_first ? a.max : b.max;
  const float top_rest = a_first ? a.rest : b.rest;
  const float low_max = a_first ? b.max : a.max;
  const float low_rest = a_first ? b.rest : a.rest;
  // -inf - -inf is NaN, but a part that is all -inf has no mass
  const float weight = low_max == -INFINITY ? 0.0f : decay(low_max - top_max);
  return {top_max, fmaf(low_rest, weight, top_rest) + weight, a_first ? a.id : b.id};
}

DMAX_HOST_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

// log2(e) / temperature, the factor that turns differences of logits into exponents of 2
DMAX_HOST_DEVICE float softmax_scale(double temperature) {
  const double scale = kLog2EDouble / temperature;
  constexpr double kLargest = 3.4028234663852886e38;  // infinity would make 0 * scale a NaN
  return static_cast<float>(scale < kLargest ? scale : kLargest);
}

// NaN if the row holds a NaN or +inf, or only -inf
DMAX_HOST_DEVICE float top1_probability(const SoftmaxStats& stats) {
  return is_finite(stats.max) ? 1.0f / (1.0f + stats.rest) : NAN;
}

}  // namespace dmax
