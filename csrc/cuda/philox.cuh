// Philox4x32-10, the counter-based generator of Salmon et al. (2011), and its exponential noise.
#pragma once

#include "cuda/platform.cuh"

namespace dmax::cuda {

struct Words {
  uint32_t x, y, z, w;
};

__device__ __forceinline__ uint32_t word_of(const Words& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// The noise of one row. The key is the seed; the counter holds the place's group of four, the row
// and the offset. An id's place is the id in the whole vocabulary, a draw tile's comes after
// kTileCounters.
struct NoiseStream {
  uint32_t key_low, key_high;
  uint32_t row;
  uint32_t offset_low, offset_high;

  __device__ __forceinline__ uint32_t word(uint32_t place) const {
    return word_of(words(place >> 2), static_cast<int>(place & 3));
  }

  // The words of the places 4 * group to 4 * group + 3
  __device__ __forceinline__ Words words(uint32_t group) const {
    Words c{group, row, offset_low, offset_high};
    uint32_t k0 = key_low;
    uint32_t k1 = key_high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c.x;
      const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c.z;
      c = {static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1),
           static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(p0)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }
};

__device__ __forceinline__ NoiseStream noise_stream(const int64_t* pair, int64_t row) {
  const auto seed = static_cast<uint64_t>(pair[0]);
  const auto offset = static_cast<uint64_t>(pair[1]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(row), static_cast<uint32_t>(offset),
          static_cast<uint32_t>(offset >> 32)};
}

// Gumbel noise -log(E), E = -log1p(-v): the small v that win the race keep their full precision
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float v = fminf((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  return -logf(-log1pf(-v));
}

// No noise is larger: -log(-log1p(-2^-33)) is 22.87
constexpr float kLargestNoise = 23.0f;

}  // namespace dmax::cuda
