// Sixteen float32 lanes on every instruction set, with the vector extension of gcc and clang.
//
// tile_kernels_isa.cpp is compiled once per instruction set with this header. Everything lives in
// a namespace named after the set (DMAX_ISA): the linker would otherwise merge the copies and run
// AVX-512 code on a machine without it. For the same reason, nothing here may call an inline
// function or template of the standard library.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "common/element_types.h"

#define DMAX_INLINE inline __attribute__((always_inline))

namespace dmax::cpu::DMAX_ISA {

// The lane count is the same everywhere, so sums are added in the same order on every set
constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kNativeBytes = 64;
#elif defined(__AVX2__)
constexpr int kNativeBytes = 32;
#else
constexpr int kNativeBytes = 16;
#endif
constexpr int kParts = 64 / kNativeBytes;
constexpr int kNativeLanes = kNativeBytes / 4;

// gcc 12 turns comparisons of vectors wider than the machine's into scalar code, so the sixteen
// lanes are an array of native vectors
template <class T>
struct Vec {
  typedef T Native __attribute__((vector_size(kNativeBytes)));
  Native part[kParts];

  DMAX_INLINE T operator[](int lane) const {
    return part[lane / kNativeLanes][lane % kNativeLanes];
  }
};

typedef Vec<float> VecF;
typedef Vec<int32_t> VecI;
typedef Vec<uint32_t> VecU;

template <class T>
DMAX_INLINE Vec<T> splat(T x) {
  Vec<T> y;
  for (int i = 0; i < kParts; ++i) y.part[i] = x - typename Vec<T>::Native{};
  return y;
}

#define DMAX_VECTOR_OPERATOR(op)                                         \
  template <class T>                                                     \
  DMAX_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) {                   \
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] op b.part[i]; \
    return a;                                                            \
  }                                                                      \
  template <class T>                                                     \
  DMAX_INLINE Vec<T> operator op(Vec<T> a, T b) {                        \
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] op b;         \
    return a;                                                            \
  }
DMAX_VECTOR_OPERATOR(+)
DMAX_VECTOR_OPERATOR(-)
DMAX_VECTOR_OPERATOR(*)
DMAX_VECTOR_OPERATOR(/)
DMAX_VECTOR_OPERATOR(&)
DMAX_VECTOR_OPERATOR(|)
DMAX_VECTOR_OPERATOR(^)
#undef DMAX_VECTOR_OPERATOR

#define DMAX_VECTOR_COMPARISON(op)                                                           \
  template <class T>                                                                         \
  DMAX_INLINE VecI operator op(Vec<T> a, Vec<T> b) {                                         \
    VecI lanes;                                                                              \
    for (int i = 0; i < kParts; ++i) lanes.part[i] = (VecI::Native)(a.part[i] op b.part[i]); \
    return lanes;                                                                            \
  }
DMAX_VECTOR_COMPARISON(<)
DMAX_VECTOR_COMPARISON(>)
DMAX_VECTOR_COMPARISON(>=)
DMAX_VECTOR_COMPARISON(==)
DMAX_VECTOR_COMPARISON(!=)
#undef DMAX_VECTOR_COMPARISON

template <class T>
DMAX_INLINE Vec<T> shift_left(Vec<T> a, int bits) {
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] << bits;
  return a;
}

template <class T>
DMAX_INLINE Vec<T> shift_right(Vec<T> a, int bits) {
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] >> bits;
  return a;
}

template <class T>
DMAX_INLINE Vec<T> select(VecI lanes, Vec<T> a, Vec<T> b) {
  for (int i = 0; i < kParts; ++i) a.part[i] = lanes.part[i] ? a.part[i] : b.part[i];
  return a;
}

// The same bits as a different type
template <class To, class From>
DMAX_INLINE Vec<To> bits_as(Vec<From> x) {
  Vec<To> y;
  for (int i = 0; i < kParts; ++i) y.part[i] = (typename Vec<To>::Native)x.part[i];
  return y;
}

// The same numbers as a different type
template <class To, class From>
DMAX_INLINE Vec<To> convert(Vec<From> x) {
  Vec<To> y;
  for (int i = 0; i < kParts; ++i) {
    y.part[i] = __builtin_convertvector(x.part[i], typename Vec<To>::Native);
  }
  return y;
}

DMAX_INLINE VecI lane_index() {
  constexpr int32_t index[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  VecI x;
  __builtin_memcpy(&x, index, sizeof(x));
  return x;
}

// High and low words of the 64-bit products a * b
DMAX_INLINE void multiply_wide(VecU a, uint32_t b, VecU* high, VecU* low) {
  typedef uint64_t Wide __attribute__((vector_size(kNativeBytes)));
  constexpr uint64_t kLow = 0xffffffffu;
  for (int i = 0; i < kParts; ++i) {
    const Wide words = (Wide)a.part[i];
    const Wide even = (words & kLow) * b;
    const Wide odd = (words >> 32) * b;
    high->part[i] = (VecU::Native)((even >> 32) | (odd & ~kLow));
    low->part[i] = (VecU::Native)((even & kLow) | (odd << 32));
  }
}

// ---- Loads and stores: rows start anywhere, so none requires alignment ----

DMAX_INLINE void store_words(uint16_t* p, VecU x) {
  typedef uint16_t Narrow __attribute__((vector_size(kNativeLanes * 2)));
  for (int i = 0; i < kParts; ++i) {
    const Narrow words = __builtin_convertvector(x.part[i], Narrow);
    __builtin_memcpy(p + i * kNativeLanes, &words, sizeof(words));
  }
}

// One native vector
DMAX_INLINE VecF::Native load_part(const float* p) {
  VecF::Native x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

DMAX_INLINE void store(float* p, VecF x) {
  for (int i = 0; i < kParts; ++i) {
    __builtin_memcpy(p + i * kNativeLanes, &x.part[i], kNativeBytes);
  }
}

#if !defined(__AVX2__)
// One native vector of 16-bit words. The half vector is widened as part of a whole one: on aarch64,
// gcc 12 converts a vector of 64 bits through general registers.
DMAX_INLINE VecU::Native load_words(const uint16_t* p) {
  typedef uint16_t Words __attribute__((vector_size(16)));
  typedef uint64_t Halves __attribute__((vector_size(16)));
  typedef uint32_t Wide __attribute__((vector_size(32)));
  uint64_t half;
  __builtin_memcpy(&half, p, sizeof(half));
  const Wide wide = __builtin_convertvector((Words)Halves{half, 0}, Wide);
  return VecU::Native{wide[0], wide[1], wide[2], wide[3]};
}
#endif

DMAX_INLINE VecF::Native load_part(const BFloat16* p) {
#if defined(__AVX512F__)  // gcc 12 widens in two halves, or four
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const VecU::Native bits = (VecU::Native)_mm512_maskz_cvtepu16_epi32(0xffff, words);
#elif defined(__AVX2__)
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const VecU::Native bits = (VecU::Native)_mm256_cvtepu16_epi32(words);
#else
  const VecU::Native bits = load_words(&p->bits);
#endif
  return (VecF::Native)(bits << 16);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Without constants, for which loops with exponentials have no register left
DMAX_INLINE void store(BFloat16* p, VecF x) {
  VecU::Native words[kParts];
  for (int i = 0; i < kParts; ++i) {
    const VecU::Native bits = (VecU::Native)x.part[i];
    const VecU::Native number = (VecU::Native)(x.part[i] == x.part[i]);
    const VecU::Native nan = (VecU::Native)(x.part[i] != x.part[i]);
    const VecU::Native odd = (bits << 15) >> 31;
    words[i] = ((bits + (number >> 17) + odd) | nan) >> 16;
  }
  const __m256i packed = _mm256_packus_epi32((__m256i)words[0], (__m256i)words[1]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
#else
DMAX_INLINE void store(BFloat16* p, VecF x) {
  const VecU bits = bits_as<uint32_t>(x);
  const VecU odd = shift_right(bits, 16) & 1u;
  const VecU rounded = bits + odd + 0x7fffu;  // to nearest even
  // Rounding could make a NaN infinity; with all bits set, it stays a NaN
  store_words(&p->bits, shift_right(rounded | bits_as<uint32_t>(x != x), 16));
}
#endif

#if defined(__AVX512F__)
DMAX_INLINE VecF::Native load_part(const Float16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (VecF::Native)_mm512_maskz_cvtph_ps(0xffff, half);
}
DMAX_INLINE void store(Float16* p, VecF x) {
  __m512 wide;
  __builtin_memcpy(&wide, &x, sizeof(x));
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, wide, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
#elif defined(__F16C__)
DMAX_INLINE VecF::Native load_part(const Float16* p) {
  return (VecF::Native)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DMAX_INLINE void store(Float16* p, VecF x) {
  __m256 parts[2];
  __builtin_memcpy(parts, &x, sizeof(x));
  __m128i* half = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(half, _mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(half + 1, _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT));
}
#else
DMAX_INLINE VecF::Native load_part(const Float16* p) {
  const VecU::Native bits = load_words(&p->bits);
  const VecU::Native sign = (bits & 0x8000u) << 16;
  const VecU::Native exponent = (bits >> 10) & 0x1fu;
  const VecU::Native normal = ((bits & 0x7fffu) << 13) + (112u << 23);
  const VecU::Native special = ((bits & 0x7fffu) << 13) + (224u << 23);  // infinity and NaN
  const VecI::Native fraction = (VecI::Native)(bits & 0x3ffu);
  const VecF::Native subnormal =
      __builtin_convertvector(fraction, VecF::Native) * 5.9604644775390625e-8f;
  VecU::Native magnitude = exponent == 31u ? special : normal;
  magnitude = exponent == 0u ? (VecU::Native)subnormal : magnitude;
  return (VecF::Native)(magnitude | sign);
}
DMAX_INLINE void store(Float16* p, VecF x) {
  const VecU bits = bits_as<uint32_t>(x);
  const VecU sign = shift_right(bits, 16) & 0x8000u;
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU odd = shift_right(magnitude, 13) & 1u;
  const VecU normal = shift_right(magnitude + odd + (0xfffu - (112u << 23)), 13);
  // Adding 0.5 leaves a subnormal half's bits, correctly rounded, at the end of the sum
  const VecU subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  VecU half = select(magnitude < splat(113u << 23), subnormal, normal);
  half = select(magnitude >= splat(0x477ff000u), splat(0x7c00u), half);  // 65520 and up: infinity
  half = select(magnitude > splat(0x7f800000u), splat(0x7e00u), half);   // NaN
  store_words(&p->bits, half | sign);
}
#endif

template <class T>
DMAX_INLINE VecF load(const T* p) {
  VecF x;
  for (int i = 0; i < kParts; ++i) x.part[i] = load_part(p + i * kNativeLanes);
  return x;
}

DMAX_INLINE float load_one(const float* p) { return *p; }

template <class T>
DMAX_INLINE float load_one(const T* p) {
  T lanes[kLanes] = {};
  lanes[0] = *p;
  return load(lanes)[0];
}

// The last, partial vector of a range: `count` < 16 elements, then `filler` in the other lanes
template <class T>
DMAX_INLINE VecF load_tail(const T* p, int count, float filler) {
  T lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return select(lane_index() < splat(count), load(lanes), splat(filler));
}

template <class T>
DMAX_INLINE void store_tail(T* p, int count, VecF x) {
  T lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

}  // namespace dmax::cpu::DMAX_ISA
