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

// What a kernel knows about a row's first id at compile time
enum class FirstId {
  kZero,
  kMultipleOf4,
  kAny,  // four adjacent ids of the row may need the words of two counters
};

// The noise of one row of logits, whose ids begin at first_id. The key is the seed; the counter
// holds the id's group of four, the row and the offset.
template <FirstId kFirst>
struct NoiseStream {
  uint32_t key_low, key_high;
  uint32_t row;
  uint32_t offset_low, offset_high;
  uint32_t first_group;  // first_id / 4
  uint32_t shift;        // first_id % 4

  // The words of the row's elements 4 * group to 4 * group + 3
  __device__ __forceinline__ Words words(uint32_t group) const {
    const Words low = group_words(group);
    if (kFirst != FirstId::kAny || shift == 0) return low;
    const Words high = group_words(group + 1);
    if (shift == 1) return {low.y, low.z, low.w, high.x};
    if (shift == 2) return {low.z, low.w, high.x, high.y};
    return {low.w, high.x, high.y, high.z};
  }

  // The word of one element
  __device__ __forceinline__ uint32_t word(int element) const {
    const uint32_t place = static_cast<uint32_t>(element) + (kFirst == FirstId::kAny ? shift : 0);
    return word_of(group_words(place >> 2), place & 3);
  }

  // The words of the ids 4 * (first_group + group) to 4 * (first_group + group) + 3
  __device__ __forceinline__ Words group_words(uint32_t group) const {
    Words c{kFirst == FirstId::kZero ? group : first_group + group, row, offset_low, offset_high};
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

template <FirstId kFirst>
__device__ __forceinline__ NoiseStream<kFirst> noise_stream(const int64_t* pair, int64_t row,
                                                            uint32_t first_id) {
  const auto seed = static_cast<uint64_t>(pair[0]);
  const auto offset = static_cast<uint64_t>(pair[1]);
  return {static_cast<uint32_t>(seed),
          static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(row),
          static_cast<uint32_t>(offset),
          static_cast<uint32_t>(offset >> 32),
          first_id >> 2,
          first_id & 3};
}

// Gumbel noise -log(E), E = -log1p(-v): the small v that win the race keep their full precision
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float v = fminf((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  return -logf(-log1pf(-v));
}

// 1 + v, rounded down to a multiple of 2^-23, for two integer instructions
__device__ __forceinline__ float one_plus_floor(uint32_t word) {
  return __uint_as_float((word >> 9) | 0x3f800000u);
}

}  // namespace dmax::cuda
