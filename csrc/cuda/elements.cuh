// Sixteen bytes as float32 elements, and back.
#pragma once

#include "cuda/platform.cuh"

namespace dmax::cuda {

template <class T>
constexpr int kWidth = 16 / sizeof(T);  // elements of 16 bytes

__device__ __forceinline__ uint32_t word(const uint4& raw, int i) {
  return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
}
__device__ __forceinline__ void set_word(uint4& raw, int i, uint32_t value) {
  if (i == 0) raw.x = value;
  if (i == 1) raw.y = value;
  if (i == 2) raw.z = value;
  if (i == 3) raw.w = value;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) { return half_to_float(x.bits); }

__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, BFloat16* out) {
  out->bits = float_to_bfloat16(x);
}
__device__ __forceinline__ void from_float(float x, Float16* out) { out->bits = float_to_half(x); }

// The bits of an element, in the low bits of a word
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(BFloat16 x) { return x.bits; }
__device__ __forceinline__ uint32_t bits_of(Float16 x) { return x.bits; }

__device__ __forceinline__ void store_bits(float* p, uint32_t bits) { *p = __uint_as_float(bits); }
__device__ __forceinline__ void store_bits(BFloat16* p, uint32_t bits) {
  p->bits = static_cast<uint16_t>(bits);
}
__device__ __forceinline__ void store_bits(Float16* p, uint32_t bits) {
  p->bits = static_cast<uint16_t>(bits);
}

template <class T>
__device__ __forceinline__ uint32_t minus_infinity_bits();
template <>
__device__ __forceinline__ uint32_t minus_infinity_bits<float>() {
  return 0xff800000u;
}
template <>
__device__ __forceinline__ uint32_t minus_infinity_bits<BFloat16>() {
  return 0xff80u;
}
template <>
__device__ __forceinline__ uint32_t minus_infinity_bits<Float16>() {
  return 0xfc00u;
}

// Element e of 16 bytes; e must be a constant once the loop around it is unrolled
template <class T>
__device__ __forceinline__ float element(const uint4& raw, int e);
template <>
__device__ __forceinline__ float element<float>(const uint4& raw, int e) {
  return __uint_as_float(word(raw, e));
}
template <>
__device__ __forceinline__ float element<BFloat16>(const uint4& raw, int e) {
  const uint32_t pair = word(raw, e / 2);
  return __uint_as_float(e % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
}
template <>
__device__ __forceinline__ float element<Float16>(const uint4& raw, int e) {
  const uint32_t pair = word(raw, e / 2);
  return half_to_float(static_cast<uint16_t>(e % 2 == 0 ? pair : pair >> 16));
}

// The same for an e that is known only when the code runs
template <class T>
__device__ __forceinline__ float element_at(const uint4& raw, int e) {
  constexpr int kInWord = sizeof(uint32_t) / sizeof(T);
  const int place = e / kInWord;
  const uint32_t low = (place & 1) == 0 ? raw.x : raw.y;
  const uint32_t high = (place & 1) == 0 ? raw.z : raw.w;
  const uint32_t bits = (place & 2) == 0 ? low : high;
  const uint4 its_word{bits, bits, bits, bits};
  return e % kInWord == 0 ? element<T>(its_word, 0) : element<T>(its_word, kInWord - 1);
}

// The largest element, NaN left out. The 16-bit types are compared packed: converted elements, kept
// from here to their exponentials, would not fit into registers.
template <class T>
__device__ __forceinline__ float vector_max(const uint4& raw);
template <>
__device__ __forceinline__ float vector_max<float>(const uint4& raw) {
  return fmaxf(fmaxf(element<float>(raw, 0), element<float>(raw, 1)),
               fmaxf(element<float>(raw, 2), element<float>(raw, 3)));
}
template <>
__device__ __forceinline__ float vector_max<BFloat16>(const uint4& raw) {
  const uint32_t pair = max_bfloat16x2(max_bfloat16x2(raw.x, raw.y), max_bfloat16x2(raw.z, raw.w));
  return fmaxf(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float vector_max<Float16>(const uint4& raw) {
  const uint32_t pair = max_half2(max_half2(raw.x, raw.y), max_half2(raw.z, raw.w));
  return fmaxf(half_to_float(static_cast<uint16_t>(pair)),
               half_to_float(static_cast<uint16_t>(pair >> 16)));
}

template <class T>
__device__ __forceinline__ void set_element_bits(uint4& raw, int e, uint32_t bits) {
  if (sizeof(T) == 4) {
    set_word(raw, e, bits);
    return;
  }
  const uint32_t pair = word(raw, e / 2);
  set_word(raw, e / 2,
           e % 2 == 0 ? (pair & 0xffff0000u) | bits : (pair & 0x0000ffffu) | (bits << 16));
}

// Two elements of 16 bits in a word, the first in its low bits: one instruction converts both
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_pair<BFloat16>(float first, float second) {
  return floats_to_bfloat16x2(first, second);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<Float16>(float first, float second) {
  return floats_to_half2(first, second);
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&values)[kWidth<T>]) {
  uint4 raw{0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      set_word(raw, i, __float_as_uint(values[i]));
    else
      set_word(raw, i, pack_pair<T>(values[2 * i], values[2 * i + 1]));
  }
  return raw;
}

__device__ __forceinline__ bool aligned_16(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

}  // namespace dmax::cuda
