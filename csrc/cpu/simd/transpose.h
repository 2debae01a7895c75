// Sixteen vectors of sixteen lanes, rows to columns; for files compiled once per instruction set.
#pragma once

#include "cpu/simd/simd.h"
#include "cpu/simd/vector_math.h"

namespace dmax::cpu::DMAX_ISA {

#if defined(__AVX512F__)
// Lanes that swap the off-diagonal quarters of squares of side 8, 4, 2, 1. They are read from
// memory, since gcc 12 would otherwise write them to the stack in every call.
struct SwappedLanes {
  alignas(64) int32_t low[4][kLanes] = {};
  alignas(64) int32_t high[4][kLanes] = {};

  constexpr SwappedLanes() {
    for (int level = 0; level < 4; ++level) {
      const int side = 8 >> level;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool second = lane & side;
        low[level][lane] = second ? kLanes + lane - side : lane;
        high[level][lane] = second ? kLanes + lane : lane + side;
      }
    }
  }
};
static constexpr SwappedLanes kSwappedLanes;
#endif

DMAX_INLINE void transpose(VecF* x) {
#if defined(__AVX512F__)
  // Swaps the off-diagonal quarters of ever smaller squares: 64 permutations in all
  static_assert(kLanes == 16, "four levels");
#pragma GCC unroll 4
  for (int level = 0; level < 4; ++level) {
    const int side = 8 >> level;
    const __m512i take_low = _mm512_load_si512(kSwappedLanes.low[level]);
    const __m512i take_high = _mm512_load_si512(kSwappedLanes.high[level]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & side) continue;
      const __m512 a = (__m512)x[i].part[0], b = (__m512)x[i + side].part[0];
      x[i].part[0] = (VecF::Native)_mm512_permutex2var_ps(a, take_low, b);
      x[i + side].part[0] = (VecF::Native)_mm512_permutex2var_ps(a, take_high, b);
    }
  }
#else
  float lanes[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane][i] = x[i][lane];
  }
  for (int i = 0; i < kLanes; ++i) x[i] = load(lanes[i]);
#endif
}

#if defined(__AVX512F__)
// Lane i of the result is combine's reduction of x[i], along the tree of reduce_add and reduce_max.
// 45 instructions, where sixteen reductions of their own are 200.
template <class Combine>
DMAX_INLINE VecF reduce_each(VecF* x, const Combine& combine) {
#pragma GCC unroll 4
  for (int level = 0; level < 4; ++level) {
    const int side = 8 >> level;
    const __m512i take_low = _mm512_load_si512(kSwappedLanes.low[level]);
    const __m512i take_high = _mm512_load_si512(kSwappedLanes.high[level]);
#pragma GCC unroll 8
    for (int i = 0; i < side; ++i) {
      const __m512 a = (__m512)x[i].part[0], b = (__m512)x[i + side].part[0];
      x[i].part[0] = combine((VecF::Native)_mm512_permutex2var_ps(a, take_low, b),
                             (VecF::Native)_mm512_permutex2var_ps(a, take_high, b));
    }
  }
  return x[0];
}

DMAX_INLINE VecF add_each(VecF* x) {
  return reduce_each(x, [](VecF::Native a, VecF::Native b) { return a + b; });
}
DMAX_INLINE VecF max_each(VecF* x) { return reduce_each(x, max_part); }
#else
DMAX_INLINE VecF add_each(VecF* x) {
  float sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = reduce_add(x[i]);
  return load(sums);
}
DMAX_INLINE VecF max_each(VecF* x) {
  float most[kLanes];
  for (int i = 0; i < kLanes; ++i) most[i] = reduce_max(x[i]);
  return load(most);
}
#endif

// columns[16][16] -> out[row * stride + column], for the first `rows` rows and `count` columns
DMAX_INLINE void store_transposed(const float* columns, int64_t rows, int64_t count, float* out,
                                  int64_t stride) {
  VecF x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = load(columns + i * kLanes);
  transpose(x);
  for (int row = 0; row < kLanes && row < rows; ++row) {
    if (count >= kLanes) {
      store(out + row * stride, x[row]);
    } else {
      store_tail(out + row * stride, static_cast<int>(count), x[row]);
    }
  }
}

}  // namespace dmax::cpu::DMAX_ISA
