// Options of the OPUT loss.
#pragma once

#include <cstdint>

namespace dmax {

// Real is the type that the backend computes a row's loss in.
template <class Real>
struct LossOptions {
  int64_t ignore_index;
  Real label_smoothing;
  Real z_loss;
};

}  // namespace dmax
