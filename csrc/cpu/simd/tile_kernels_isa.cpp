// The loops of tile_kernels.h; compiled once per instruction set (DMAX_ISA).
#include "common/constants.h"
#include "cpu/simd/comparisons.h"
#include "cpu/simd/tile_kernels.h"
#include "cpu/simd/vector_math.h"
#include "cpu/simd/weighted_sums.h"

namespace dmax::cpu::DMAX_ISA {

namespace {

template <class T>
float value(const T* x) {
  return load_one(x);
}

// One loop for both, so that the sum of exponentials has the same bits with and without the other.
// It processes one native vector at a time and keeps few sums, so that constants, sums and
// temporaries fit into AVX2's sixteen registers (a test reads the object code): with exponents, it
// goes over a block once for each part of the sixteen lanes.
template <bool kWithExponents, class T>
DMAX_INLINE EntropySums exp_sums(const T* x, int64_t n, float maximum, float scale) {
  constexpr int64_t kBlock = 512;  // elements in one float32 sum per lane: 32 additions
  constexpr int kPasses = kWithExponents ? kParts : 1;
  constexpr int kPartsOfPass = kParts / kPasses;
  const VecF::Native top = maximum - VecF::Native{}, factor = scale - VecF::Native{};
  VecF total = splat(0.0f), total_weighted = splat(0.0f);
  const auto add = [&](VecF::Native v, VecF::Native* sum, VecF::Native* weighted) {
    // Subtract before scaling: the difference is exact near the maximum, even at an offset of 1e4
    const VecF::Native exponent = (v - top) * factor;
    const VecF::Native weight = exp2_part(exponent);
    *sum += weight;
    if (kWithExponents) {  // bounded as in exp2: -inf * 0 would be a NaN
      *weighted += max_part(exponent, -126.0f - VecF::Native{}) * weight;
    }
  };
  int64_t i = 0;
  while (i + kLanes <= n) {
    const int64_t end = n - i < kBlock ? n - kLanes : i + kBlock - kLanes;
    int64_t next = i;
    for (int pass = 0; pass < kPasses; ++pass) {
      VecF::Native sum[kPartsOfPass] = {}, weighted[kPartsOfPass] = {};
#pragma GCC unroll 1
      for (next = i; next <= end; next += kLanes) {
        for (int j = 0; j < kPartsOfPass; ++j) {
          add(load_part(x + next + (pass + j) * kNativeLanes), &sum[j], &weighted[j]);
        }
      }
      for (int j = 0; j < kPartsOfPass; ++j) {
        total.part[pass + j] += sum[j];
        total_weighted.part[pass + j] += weighted[j];
      }
    }
    i = next;
  }
  if (i < n) {
    const int count = static_cast<int>(n - i);
    const VecF last = load_tail(x + i, count, -kInfinity);
    VecF sum = splat(0.0f), weighted = splat(0.0f);
    for (int j = 0; j < kParts; ++j) add(last.part[j], &sum.part[j], &weighted.part[j]);
    const VecI used = lane_index() < splat(count);
    total = total + select(used, sum, splat(0.0f));
    total_weighted = total_weighted + select(used, weighted, splat(0.0f));
  }
  return {reduce_add(total), kWithExponents ? reduce_add(total_weighted) : 0.0f};
}

template <class T>
float sum_exp(const T* x, int64_t n, float maximum, float scale) {
  return exp_sums<false>(x, n, maximum, scale).weight;
}

template <class T>
EntropySums entropy_sums(const T* x, int64_t n, float maximum, float scale) {
  return exp_sums<true>(x, n, maximum, scale);
}

template <class T>
double sum(const T* x, int64_t n, float shift) {
  // Adding a double per 256 elements keeps the error from growing with n
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 256) {
    const int64_t count = n - begin < 256 ? n - begin : 256;
    VecF part = splat(0.0f);
    for_each_vector(x + begin, count, shift, [&](VecF v, int64_t) { part = part + (v - shift); });
    total += reduce_add(part);
  }
  return total;
}

template <class T>
void softmax_grad(const T* x, T* y, int64_t n, float maximum, float scale, float factor,
                  float shift) {
  const auto gradient = [&](VecF v) {
    for (int i = 0; i < kParts; ++i) {
      v.part[i] = exp2_part((v.part[i] - maximum) * scale) * factor + shift;
    }
    return v;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, gradient(load(x + i)));
  if (i < n) {
    const int count = static_cast<int>(n - i);
    store_tail(y + i, count, gradient(load_tail(x + i, count, maximum)));
  }
}

template <class T>
void softcap_and_bias(T* x, int64_t n, float softcap, const float* bias) {
  const float inverse = 1.0f / softcap;
  const auto transformed = [&](VecF v, VecF shift) {
    for (int i = 0; softcap > 0 && i < kParts; ++i) {
      const VecF::Native capped = tanh_part(v.part[i] * inverse) * softcap;
      const VecI::Native finite = (VecI::Native)(v.part[i] - v.part[i] == 0.0f);
      v.part[i] = finite ? capped : v.part[i];
    }
    return v + shift;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(x + i, transformed(load(x + i), bias ? load(bias + i) : splat(0.0f)));
  }
  if (i < n) {
    const int count = static_cast<int>(n - i);
    const VecF shift = bias ? load_tail(bias + i, count, 0.0f) : splat(0.0f);
    store_tail(x + i, count, transformed(load_tail(x + i, count, 0.0f), shift));
  }
}

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  // Block sums are added in double, so that the norm of a long row is accurate to float32
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 512) {
    const int64_t end = n - begin < 512 ? n : begin + 512;
    VecF part = splat(0.0f);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      part = part + load(a + i) * load(b + i);
    }
    if (i < end) {
      const int count = static_cast<int>(end - i);
      part = part + load_tail(a + i, count, 0.0f) * load_tail(b + i, count, 0.0f);
    }
    total += reduce_add(part);
  }
  return total;
}

template <class T>
void add_scaled(float* sum, const T* x, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(sum + i, load(sum + i) + load(x + i) * factor);
  for (; i < n; ++i) sum[i] += load_one(x + i) * factor;
}

template <class T>
void store_scaled(T* y, const float* x, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * factor);
  if (i < n) {
    const int count = static_cast<int>(n - i);
    store_tail(y + i, count, load_tail(x + i, count, 0.0f) * factor);
  }
}

template <class T>
void widen(float* y, const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  for (; i < n; ++i) y[i] = load_one(x + i);
}

template <class T>
void gather(const T* x, const int64_t* places, float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = load_one(x + places[i]);
}

template <class T>
void scatter(T* x, const int64_t* places, const float* values, int64_t n) {
  T rounded[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    store(rounded, count == kLanes ? load(values + i) : load_tail(values + i, count, 0.0f));
    for (int j = 0; j < count; ++j) x[places[i + j]] = rounded[j];
  }
}

template <class T>
void row_products(const T* x, int64_t x_stride, int64_t tokens, const float* a, int64_t num_rows,
                  int64_t dim, float* products, int64_t stride) {
  // Eight chains of sums in native registers are enough to hide the latency of an addition. Sums of
  // different tokens are never added, so a token's bits depend on its own row alone.
  constexpr int kTokens = 8 / kParts;
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const T* token[kTokens];
    for (int j = 0; j < kTokens; ++j) {
      token[j] = x + (t + j < tokens ? t + j : tokens - 1) * x_stride;
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* values = a + row * dim;
      VecF sum[kTokens];
      for (int j = 0; j < kTokens; ++j) sum[j] = splat(0.0f);
      int64_t k = 0;
      for (; k + kLanes <= dim; k += kLanes) {
        const VecF factor = load(values + k);
        for (int j = 0; j < kTokens; ++j) sum[j] = sum[j] + load(token[j] + k) * factor;
      }
      if (k < dim) {
        const int count = static_cast<int>(dim - k);
        const VecF factor = load_tail(values + k, count, 0.0f);
        for (int j = 0; j < kTokens; ++j) {
          sum[j] = sum[j] + load_tail(token[j] + k, count, 0.0f) * factor;
        }
      }
      float* out = products + row * stride + t;
      for (int j = 0; j < kTokens && t + j < tokens; ++j) out[j] = reduce_add(sum[j]);
    }
  }
}

template <class T>
constexpr TileKernels<T> kernels() {
  return {value<T>,
          maximum<T>,
          find<T>,
          find_above<T>,
          sum_exp<T>,
          entropy_sums<T>,
          count_before<T>,
          weigh<T>,
          sum<T>,
          softmax_grad<T>,
          softcap_and_bias<T>,
          dot<T>,
          add_scaled<T>,
          add_mixed<T>,
          store_scaled<T>,
          widen<T>,
          gather<T>,
          scatter<T>,
          row_products<T>};
}

}  // namespace

extern const TileKernels<float> kFloat32Kernels = kernels<float>();
extern const TileKernels<BFloat16> kBFloat16Kernels = kernels<BFloat16>();
extern const TileKernels<Float16> kFloat16Kernels = kernels<Float16>();

}  // namespace dmax::cpu::DMAX_ISA
