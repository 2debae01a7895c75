// The loops of tile_kernels.h that compare elements: maxima, searches, counts; for files compiled
// once per instruction set.
#pragma once

#include "cpu/simd/simd.h"
#include "cpu/simd/vector_math.h"

namespace dmax::cpu::DMAX_ISA {

namespace {

constexpr float kInfinity = __builtin_inff();

// Calls f(vector, place) over x[0, n); the last vector is padded with `filler`
template <class T, class F>
DMAX_INLINE void for_each_vector(const T* x, int64_t n, float filler, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(load(x + i), i);
  if (i < n) f(load_tail(x + i, static_cast<int>(n - i), filler), i);
}

template <class T>
float maximum(const T* x, int64_t n) {
  // Two chains hide the latency of the comparison. The maximum drops NaN, so a separate comparison,
  // one for two vectors, looks for them.
  VecF best0 = splat(-kInfinity), best1 = best0;
  VecI nan = splat<int32_t>(0);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const VecF first = load(x + i), second = load(x + i + kLanes);
    best0 = max(first, best0);
    best1 = max(second, best1);
    nan = nan | unordered(first, second);
  }
  for (; i < n; i += kLanes) {
    const int64_t left = n - i;
    const VecF last =
        left >= kLanes ? load(x + i) : load_tail(x + i, static_cast<int>(left), -kInfinity);
    best0 = max(last, best0);
    nan = nan | unordered(last, last);
  }
  if (any(nan)) return __builtin_nanf("");
  return reduce_max(max(best0, best1));
}

// 16-bit floats are compared as integers, without widening: with the magnitude of negative numbers
// inverted, their bits sort as their values do. NaNs sort beyond the infinities, at both ends.
template <class T>
float maximum_of_bits(const T* x, int64_t n, int16_t infinity) {
  constexpr int kShorts = kNativeBytes / 2;
  typedef int16_t Shorts __attribute__((vector_size(kNativeBytes)));
  const int16_t minus_infinity = static_cast<int16_t>(~infinity);
  const auto larger = [](Shorts a, Shorts b) { return a > b ? a : b; };
  const auto smaller = [](Shorts a, Shorts b) { return a < b ? a : b; };
  const auto sortable = [](Shorts bits) { return bits ^ ((bits >> 15) & 0x7fff); };
  // Two chains of plain values: gcc stores a variable in every iteration if its address is taken
  Shorts most0 = Shorts{} + minus_infinity, most1 = most0;
  Shorts least0 = Shorts{} + infinity, least1 = least0;
  int64_t i = 0;
  for (; i + 2 * kShorts <= n; i += 2 * kShorts) {
    Shorts first, second;
    __builtin_memcpy(&first, x + i, sizeof(first));
    __builtin_memcpy(&second, x + i + kShorts, sizeof(second));
    first = sortable(first);
    second = sortable(second);
    most0 = larger(first, most0);
    least0 = smaller(first, least0);
    most1 = larger(second, most1);
    least1 = smaller(second, least1);
  }
  int16_t lanes[2][kShorts];
  const Shorts most = larger(most0, most1), least = smaller(least0, least1);
  __builtin_memcpy(lanes[0], &most, sizeof(most));
  __builtin_memcpy(lanes[1], &least, sizeof(least));
  int16_t best = minus_infinity;
  int16_t worst = infinity;
  for (int lane = 0; lane < kShorts; ++lane) {
    best = lanes[0][lane] > best ? lanes[0][lane] : best;
    worst = lanes[1][lane] < worst ? lanes[1][lane] : worst;
  }
  for (; i < n; ++i) {
    int16_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    const int16_t value = bits ^ ((bits >> 15) & 0x7fff);
    best = value > best ? value : best;
    worst = value < worst ? value : worst;
  }
  if (best > infinity || worst < minus_infinity) return __builtin_nanf("");
  const T result{static_cast<uint16_t>(best ^ ((best >> 15) & 0x7fff))};
  return load_one(&result);
}

template <>
float maximum(const BFloat16* x, int64_t n) {
  return maximum_of_bits(x, n, 0x7f80);
}

template <>
float maximum(const Float16* x, int64_t n) {
  return maximum_of_bits(x, n, 0x7c00);
}

template <class T, class Test>
DMAX_INLINE int64_t find_first(const T* x, int64_t n, const Test& test) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const VecF v = count == kLanes ? load(x + i) : load_tail(x + i, count, 0.0f);
    const VecI hit = test(v);
    if (!any(hit)) continue;
    for (int lane = 0; lane < count; ++lane) {
      if (hit[lane]) return i + lane;
    }
  }
  return n;
}

template <class T>
int64_t find(const T* x, int64_t n, float value) {
  if (value != value) {
    return find_first(x, n, [](VecF v) { return v != v; });
  }
  const VecF wanted = splat(value);
  return find_first(x, n, [&](VecF v) { return v == wanted; });
}

template <class T>
int64_t find_above(const T* x, int64_t n, float threshold) {
  const VecF bound = splat(threshold);
  return find_first(x, n, [&](VecF v) { return (v > bound) | (v != v); });
}

template <class T, class Test>
DMAX_INLINE int64_t count_where(const T* x, int64_t n, const Test& test) {
  VecI passed = splat<int32_t>(0);  // minus one for every element that passes
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) passed = passed + test(load(x + i));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    const VecI lanes = test(load_tail(x + i, left, 0.0f));
    passed = passed + (lanes & (lane_index() < splat(left)));
  }
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total -= passed[lane];
  return total;
}

// How many elements are not below the threshold (or, if they must exceed it, not equal to it
// either); a NaN is neither
template <class T>
int64_t count_before(const T* x, int64_t n, float threshold, bool exceed) {
  const VecF bound = splat(threshold);
  if (exceed) return count_where(x, n, [&](VecF v) { return (v > bound) | (v != v); });
  return count_where(x, n, [&](VecF v) { return (v >= bound) | (v != v); });
}

}  // namespace

}  // namespace dmax::cpu::DMAX_ISA
