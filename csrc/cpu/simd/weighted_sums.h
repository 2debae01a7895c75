// The loops of a sum of rows weighted by a softmax (soft_embedding.cpp).
#pragma once

#include "cpu/simd/tile_kernels.h"
#include "cpu/simd/vector_math.h"

namespace dmax::cpu::DMAX_ISA {

template <class T>
void weigh(const T* x, float* y, int64_t n, float maximum, float scale) {
  const auto weights = [&](VecF v) {
    for (int i = 0; i < kParts; ++i) {
      const VecF::Native exponent = (v.part[i] - maximum) * scale;
      const VecF::Native weight = exp2_part(exponent);
      v.part[i] = exponent > -kNegligibleBits ? weight : VecF::Native{};
    }
    return v;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, weights(load(x + i)));
  if (i < n) {
    const int count = static_cast<int>(n - i);
    store_tail(y + i, count, weights(load_tail(x + i, count, maximum)));
  }
}

template <class T>
void add_mixed(float* sum, const T* const* x, const float* factors, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    VecF total = load(sum + i);
#pragma GCC unroll 8
    for (int t = 0; t < kMixed; ++t) total = total + load(x[t] + i) * factors[t];
    store(sum + i, total);
  }
  for (; i < n; ++i) {
    for (int t = 0; t < kMixed; ++t) sum[i] += load_one(x[t] + i) * factors[t];
  }
}

}  // namespace dmax::cpu::DMAX_ISA
