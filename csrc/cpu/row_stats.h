// Softmax statistics of a row, or of some of its tokens: adding tokens, merging, reading.
//
// The GPU uses common/softmax_stats.h, with float32 sums and 32-bit ids that fit in registers.
#pragma once

#include <cmath>
#include <limits>

#include "common/softmax_stats.h"
#include "cpu/simd/tile_kernels.h"

namespace dmax::cpu {

// exp(-30) from each of 262,144 tokens adds less than 3e-8 in all
constexpr double kNegligibleDepth = 30.0;

struct RowStats {
  float maximum = -std::numeric_limits<float>::infinity();  // NaN if any logit is NaN
  // Sum of exp((x - maximum) / temperature) over all tokens but the winner, whose term is 1.
  // Leaving it out keeps the precision of a probability close to 1 and of a loss close to 0.
  double rest = 0;
  int64_t token = 0;  // the first one that has the maximum

  // False if a logit is NaN or +inf, or if all are -inf: the row then has no softmax
  bool defined() const { return std::isfinite(maximum); }

  // The sum including the winner's own term
  double sum_exp() const { return defined() ? 1.0 + rest : kNan; }
  // log(1 + rest): what the logsumexp of the logits / temperature has above the largest of them
  double log_rest() const { return defined() ? std::log1p(rest) : kNan; }
  double log_sum_exp(double temperature) const { return maximum / temperature + log_rest(); }

  float confidence() const { return static_cast<float>(1.0 / sum_exp()); }
  // The probability of a token with this logit
  float probability(float logit, double temperature) const {
    const double depth = (static_cast<double>(logit) - maximum) / temperature;
    return static_cast<float>(std::exp(depth) / sum_exp());
  }

  // Adds the logits x of the next tokens, first_id .. first_id + n
  void add(const TileKernels<float>& kernels, const float* x, int64_t n, int64_t first_id,
           double temperature) {
    if (std::isnan(maximum)) return;  // the first NaN has been found
    const float scale = softmax_scale(temperature);
    const float largest = kernels.maximum(x, n);
    if (largest > maximum || std::isnan(largest)) {
      const int64_t place = kernels.find(x, n, largest);
      if (std::isfinite(largest)) {
        rest = mass_below(largest, temperature);
        rest += kernels.sum_exp(x, place, largest, scale);
        rest += kernels.sum_exp(x + place + 1, n - place - 1, largest, scale);
      }
      maximum = largest;
      token = first_id + place;
    } else if (defined() &&
               (static_cast<double>(maximum) - largest) / temperature < kNegligibleDepth) {
      rest += kernels.sum_exp(x, n, maximum, scale);
    }
  }

  // Adds the statistics of later tokens of the same row
  void merge(const RowStats& later, double temperature) {
    if (std::isnan(maximum)) return;
    if (later.maximum > maximum || std::isnan(later.maximum)) {
      const double mine = mass_below(later.maximum, temperature);
      *this = {later.maximum, later.rest + mine, later.token};
    } else if (defined()) {
      rest += later.mass_below(maximum, temperature);
    }
  }

 private:
  static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

  // The whole sum, the winner's term included, relative to `to`, which is not below this maximum
  double mass_below(float to, double temperature) const {
    if (std::isinf(maximum)) return 0;
    return (rest + 1) * std::exp((static_cast<double>(maximum) - to) / temperature);
  }
};

}  // namespace dmax::cpu
