// Reductions and functions of the vectors of simd.h.
#pragma once

#include "cpu/simd/simd.h"

namespace dmax::cpu::DMAX_ISA {

// Gives b where either is NaN. Written with intrinsics, since gcc 12 compiles the comparison to two
// instructions instead of one.
DMAX_INLINE VecF::Native max_part(VecF::Native a, VecF::Native b) {
#if defined(__AVX512F__)
  return (VecF::Native)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF::Native)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

DMAX_INLINE VecF max(VecF a, VecF b) {
  for (int i = 0; i < kParts; ++i) a.part[i] = max_part(a.part[i], b.part[i]);
  return a;
}

// The lanes where either is NaN
DMAX_INLINE VecI unordered(VecF a, VecF b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  VecI lanes;
  for (int i = 0; i < kParts; ++i) {
    lanes.part[i] = (VecI::Native)_mm256_cmp_ps((__m256)a.part[i], (__m256)b.part[i], _CMP_UNORD_Q);
  }
  return lanes;
#else
  return (a != a) | (b != b);
#endif
}

DMAX_INLINE VecF min(VecF a, VecF b) { return select(a < b, a, b); }

// Quarters of the sixteen lanes: plain vectors of four, whatever the instruction set
struct Quarters {
  typedef float Four __attribute__((vector_size(16)));
  Four part[4];
  DMAX_INLINE explicit Quarters(VecF x) { __builtin_memcpy(part, &x, sizeof(x)); }
};

// Adds along a fixed tree, so that a sum's bits depend on the values alone
DMAX_INLINE float reduce_add(VecF x) {
  const Quarters q(x);
  const Quarters::Four sum = (q.part[0] + q.part[2]) + (q.part[1] + q.part[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

DMAX_INLINE float reduce_max(VecF x) {
  const Quarters q(x);
  const auto larger = [](Quarters::Four a, Quarters::Four b) { return a > b ? a : b; };
  const Quarters::Four most = larger(larger(q.part[0], q.part[1]), larger(q.part[2], q.part[3]));
  const float even = most[0] > most[2] ? most[0] : most[2];
  const float odd = most[1] > most[3] ? most[1] : most[3];
  return even > odd ? even : odd;
}

DMAX_INLINE bool any(VecI lanes) {
  VecI::Native found = lanes.part[0];
  for (int i = 1; i < kParts; ++i) found |= lanes.part[i];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)found, (__m512i)found) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)found, (__m256i)found);
#else
  typedef int64_t Two __attribute__((vector_size(16)));
  return (((Two)found)[0] | ((Two)found)[1]) != 0;
#endif
}

// 2^x for x <= 0, relative error below 1.8e-7, never less than 2^-126, which is negligible next to
// the 1 that every sum here contains. Eleven instructions.
DMAX_INLINE VecF::Native exp2_part(VecF::Native x) {
  x = max_part(x, -126.0f - VecF::Native{});
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer. The constant is hidden from
  // the compiler, which would spend a second register on its negative.
  VecF::Native rounder = 12582912.0f - VecF::Native{};
  asm("" : "+x"(rounder));
  const VecF::Native shifted = x + rounder;
  const VecF::Native f = x - (shifted - rounder);  // in [-0.5, 0.5]
  VecF::Native p = f * 1.326472731e-3f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  // The integer sits in the low bits of the shifted sum
  return (VecF::Native)((VecU::Native)p + ((VecU::Native)shifted << 23));
}

// tanh(x), relative error below 4e-7; of a NaN it is a number
DMAX_INLINE VecF::Native tanh_part(VecF::Native x) {
  const VecU::Native sign = (VecU::Native)x & 0x80000000u;
  const auto size = (VecF::Native)((VecU::Native)x ^ sign);
  // (1 - e) / (1 + e) with e = exp(-2 |x|), which cancels near 0: there the series of tanh
  const VecF::Native e = exp2_part(size * -2.885390082f);
  const VecF::Native far = (1.0f - e) / (1.0f + e);
  const VecF::Native square = size * size;
  VecF::Native p = square * 2.186948854e-2f + -5.396825397e-2f;
  p = p * square + 1.333333333e-1f;
  p = p * square + -3.333333333e-1f;
  const VecF::Native near = size + size * square * p;
  const VecF::Native tanh = size < 0.25f ? near : far;
  return (VecF::Native)((VecU::Native)tanh | sign);
}

// ln(x) for normal x > 0, relative error below 2e-7
DMAX_INLINE VecF log(VecF x) {
  // x = 2^e * m with m in [sqrt(1/2), sqrt(2))
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const VecU offset = bits_as<uint32_t>(x) - kSqrtHalf;
  const VecF e = convert<float>(shift_right(bits_as<int32_t>(offset), 23));
  const VecF f = bits_as<float>((offset & 0x007fffffu) + kSqrtHalf) - 1.0f;
  VecF p = f * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const VecF f2 = f * f;
  const VecF tail = p * f * f2 + e * -2.12194440e-4f + f2 * -0.5f;
  return e * 0.693359375f + (f + tail);
}

}  // namespace dmax::cpu::DMAX_ISA
