// Exp(1) noise by Philox4x32-10 (see dmax_kernels/reference/sample.py).
#pragma once

#include "cpu/simd/draw_kernels.h"
#include "cpu/simd/vector_math.h"

namespace dmax::cpu::DMAX_ISA {

// The uniform numbers in (0, 1) of the counters 64 * chunk .. 64 * chunk + 63, which are ids or
// tiles: that of counter 4 * g + j is v[j][g]
inline void uniform_noise(uint32_t chunk, const NoiseKey& key, VecF* v) {
  VecU c[4] = {bits_as<uint32_t>(lane_index()) + chunk * 16u, splat(key.row),
               splat(static_cast<uint32_t>(key.offset)),
               splat(static_cast<uint32_t>(key.offset >> 32))};
  uint32_t k0 = static_cast<uint32_t>(key.seed);
  uint32_t k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    VecU high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, &high0, &low0);
    multiply_wide(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int j = 0; j < 4; ++j) {
    v[j] = min((convert<float>(c[j]) + 0.5f) * 2.3283064365386963e-10f,  // 2^-32
               splat(1.0f - 5.9604644775390625e-8f));
  }
}

// Exp(1) noise of those counters, -log1p(-v), in their order
inline void exponential_noise(const VecF* v, float* noise) {
  for (int j = 0; j < 4; ++j) {
    // -log(u) + (v - (1 - u)) / u with u = 1 - v rounded: exact down to tiny v
    const VecF one = splat(1.0f);
    const VecF u = one - v[j];
    const VecF e = (v[j] - (one - u)) / u - log(u);
    for (int g = 0; g < kLanes; ++g) noise[4 * g + j] = e[g];
  }
}

}  // namespace dmax::cpu::DMAX_ISA
