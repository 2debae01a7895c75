// The loops of draw_kernels.h; compiled once per instruction set (DMAX_ISA).
#include "cpu/simd/draw_kernels.h"

#include "cpu/simd/noise.h"
#include "cpu/simd/transpose.h"
#include "cpu/simd/vector_math.h"

namespace dmax::cpu::DMAX_ISA {

namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kVectors = kDrawTile / kLanes;  // of a draw tile

// What lies past the end counts as -inf
template <class T>
DMAX_INLINE VecF load_or_infinity(const T* x, int64_t left) {
  if (left >= kLanes) return load(x);
  return left > 0 ? load_tail(x, static_cast<int>(left), -kInfinity) : splat(-kInfinity);
}

template <class T, class F>
DMAX_INLINE void for_each_vector_of_tile(const T* x, int64_t left, const F& f) {
  for (int i = 0; i < kVectors; ++i) {
    f(i, left >= kDrawTile ? load(x + i * kLanes)
                           : load_or_infinity(x + i * kLanes, left - i * kLanes));
  }
}

// Sixteen draw tiles at a time, whose vectors of partial results become one result per lane
template <class F>
DMAX_INLINE void for_each_group(int64_t n, const F& f) {
  const int64_t tiles = (n + kDrawTile - 1) / kDrawTile;
  for (int64_t first = 0; first < tiles; first += kLanes) {
    f(first, tiles - first < kLanes ? static_cast<int>(tiles - first) : kLanes);
  }
}

DMAX_INLINE void store_some(float* y, int count, VecF x) {
  if (count == kLanes) {
    store(y, x);
  } else {
    store_tail(y, count, x);
  }
}

template <class T>
float maxima(const T* x, int64_t n, float* out) {
  VecF best = splat(-kInfinity);
  VecI nan = splat<int32_t>(0);
  for_each_group(n, [&](int64_t first, int count) {
    VecF most[kLanes];
    for (int t = 0; t < kLanes; ++t) {
      most[t] = splat(-kInfinity);
      if (t >= count) continue;
      VecF v[kVectors];
      const int64_t begin = (first + t) * kDrawTile;
      for_each_vector_of_tile(x + begin, n - begin, [&](int i, VecF each) { v[i] = each; });
      nan = nan | unordered(v[0], v[1]) | unordered(v[2], v[3]);
      most[t] = max(max(v[0], v[1]), max(v[2], v[3]));
    }
    const VecF of_tiles = max_each(most);
    store_some(out + first, count, of_tiles);
    best = max(of_tiles, best);
  });
  return any(nan) ? __builtin_nanf("") : reduce_max(best);
}

template <class T>
void masses(const T* x, int64_t n, const float* maxima, float scale, float* out) {
  const VecF::Native factor = scale - VecF::Native{};
  for_each_group(n, [&](int64_t first, int count) {
    VecF sums[kLanes];
    for (int t = 0; t < kLanes; ++t) {
      sums[t] = splat(0.0f);
      if (t >= count) continue;
      const float maximum = maxima[first + t];
      // -inf - -inf would be a NaN
      const VecF::Native top = (maximum == -kInfinity ? 0.0f : maximum) - VecF::Native{};
      const int64_t begin = (first + t) * kDrawTile;
      VecF w[kVectors];
      for_each_vector_of_tile(x + begin, n - begin, [&](int i, VecF v) {
        for (int part = 0; part < kParts; ++part) {
          w[i].part[part] = exp2_part((v.part[part] - top) * factor);
        }
      });
      sums[t] = (w[0] + w[1]) + (w[2] + w[3]);
    }
    store_some(out + first, count, add_each(sums));
  });
}

template <class T>
void widen_allowed(float* y, const T* x, int64_t n, const uint32_t* bits) {
  constexpr int kWord = 32;
  VecU lane_bit;
  for (int i = 0; i < kParts; ++i) {
    for (int lane = 0; lane < kNativeLanes; ++lane) {
      lane_bit.part[i][lane] = 1u << (i * kNativeLanes + lane);
    }
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const uint32_t half = bits[i / kWord] >> (i % kWord);
    const VecI set = (splat(half) & lane_bit) != splat(0u);
    const VecF visible = select(set, load_or_infinity(x + i, n - i), splat(-kInfinity));
    store_some(y + i, n - i < kLanes ? static_cast<int>(n - i) : kLanes, visible);
  }
}

// Appends the elements that test() hits, and their ids; returns how many
template <class T, class Test>
DMAX_INLINE int64_t collect_where(const T* x, int64_t n, int32_t first_id, float* values,
                                  int32_t* ids, const Test& test) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF v = load_or_infinity(x + i, n - i);
    // -inf has no mass and is never drawn
    const VecI hits = test(v) & (v > splat(-kInfinity));
    if (!any(hits)) continue;
    const int32_t id = first_id + static_cast<int32_t>(i);
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_test_epi32_mask((__m512i)hits.part[0], (__m512i)hits.part[0]);
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(mask, (__m512)v.part[0]));
    const __m512i place = _mm512_add_epi32((__m512i)lane_index().part[0], _mm512_set1_epi32(id));
    _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(mask, place));
    count += __builtin_popcount(mask);
#else
    for (int lane = 0; lane < kLanes; ++lane) {
      values[count] = v[lane];
      ids[count] = id + lane;
      count += hits[lane] != 0;
    }
#endif
  }
  return count;
}

template <class T>
int64_t collect(const T* x, int64_t n, float threshold, int32_t first_id, float* values,
                int32_t* ids) {
  const VecF least = splat(threshold);
  return collect_where(x, n, first_id, values, ids, [&](VecF v) { return v >= least; });
}

DMAX_INLINE VecI bucket_of(VecF v, float maximum, float per_unit, int buckets) {
  const VecF place = (splat(maximum) - v) * per_unit;
  return convert<int32_t>(min(place, splat(static_cast<float>(buckets - 1))));
}

template <class T>
void histogram(const T* x, int64_t n, float maximum, float scale, float per_unit, int buckets,
               double* amounts) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF v = load_or_infinity(x + i, n - i);
    VecF weight;
    for (int part = 0; part < kParts; ++part) {
      weight.part[part] = exp2_part((v.part[part] - maximum) * scale);
    }
    weight = select(v > splat(-kInfinity), weight, splat(0.0f));
    int32_t bucket[kLanes];
    float amount[kLanes];
    const VecI place = bucket_of(v, maximum, per_unit, buckets);
    __builtin_memcpy(bucket, &place, sizeof(bucket));
    store(amount, weight);
    for (int lane = 0; lane < kLanes; ++lane) amounts[bucket[lane]] += amount[lane];
  }
}

template <class T>
int64_t collect_bucket(const T* x, int64_t n, float maximum, float per_unit, int buckets,
                       int bucket, int32_t first_id, float* values, int32_t* ids) {
  const VecI wanted = splat(bucket);
  return collect_where(x, n, first_id, values, ids,
                       [&](VecF v) { return bucket_of(v, maximum, per_unit, buckets) == wanted; });
}

// Whether no element of at most `top` can win with one of these 64 uniform numbers. It does so
// where top - log(e) > best, e < exp(top - best), and no exponential noise e = -log1p(-v) is below
// its v. The margin is above what roundings can add to a score. On a flat row, most chunks end
// here, which spares them eight logarithms.
DMAX_INLINE bool all_lose(float top, float best, const VecF* v) {
  const float margin = 1e-4f + 1e-6f * (__builtin_fabsf(top) + __builtin_fabsf(best));
  const float gap = top - best + margin;
  if (!(gap < 0)) return false;  // or NaN
  const VecF least = min(min(v[0], v[1]), min(v[2], v[3]));
  const float bound = exp2_part(gap * kLog2E + VecF::Native{})[0];
  return -reduce_max(splat(0.0f) - least) >= bound;
}

PerturbedBest race(const float* x, int64_t n, int64_t first, NoiseKey key, float temperature,
                   PerturbedBest best) {
  // No noise exceeds -log(-log1p(-2^-33)) = 22.9.
  // Elements further below cannot win and need no random numbers.
  constexpr float kMostNoise = 23.0f;
  constexpr int64_t kChunk = 64;
  float noise[kChunk];
  const int64_t last = first + n;
  for (int64_t chunk = first / kChunk; chunk * kChunk < last; ++chunk) {
    const int64_t begin = chunk * kChunk > first ? chunk * kChunk : first;
    const int64_t end = (chunk + 1) * kChunk < last ? (chunk + 1) * kChunk : last;
    const float* values = x + (begin - first);
    VecF most = splat(-kInfinity);
    for (int64_t i = 0; i < end - begin; i += kLanes) {
      most = max(load_or_infinity(values + i, end - begin - i), most);
    }
    const float top = reduce_max(most) / temperature;
    if (!(top + kMostNoise >= best.score)) continue;
    VecF uniform[4];
    uniform_noise(static_cast<uint32_t>(chunk), key, uniform);
    if (all_lose(top, best.score, uniform)) continue;
    exponential_noise(uniform, noise);
    for (int64_t i = 0; i < end - begin; i += kLanes) {
      const int64_t left = end - begin - i;
      const int count = left < kLanes ? static_cast<int>(left) : kLanes;
      const VecF e = load_tail(noise + (begin - chunk * kChunk) + i, count, 1.0f);
      const VecF score = load_or_infinity(values + i, left) / temperature - log(e);
      for (int lane = 0; lane < count; ++lane) {
        const int64_t id = begin + i + lane;
        if (score[lane] > best.score || (score[lane] == best.score && id < best.id)) {
          best = {score[lane], id};
        }
      }
    }
  }
  return best;
}

void log_masses(const float* maxima, const float* masses, int64_t n, float temperature,
                float* scores) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const VecF maximum = load_or_infinity(maxima + i, n - i);
    const VecF mass = count == kLanes ? load(masses + i) : load_tail(masses + i, count, 0.0f);
    const VecF score = maximum / temperature + log(mass);
    store_some(scores + i, count, select(mass > splat(0.0f), score, splat(-kInfinity)));
  }
}

double total_mass(const float* x, const float* masses, int64_t n, float maximum, float scale) {
  constexpr int64_t kBlock = 512;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = n - begin < kBlock ? n : begin + kBlock;
    VecF sum = splat(0.0f);
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t left = end - i;
      const VecF mass =
          left >= kLanes ? load(masses + i) : load_tail(masses + i, static_cast<int>(left), 0.0f);
      const VecF v = load_or_infinity(x + i, left);
      for (int part = 0; part < kParts; ++part) {
        sum.part[part] += mass.part[part] * exp2_part((v.part[part] - maximum) * scale);
      }
    }
    total += reduce_add(sum);
  }
  return total;
}

void weights(const float* x, float* y, int64_t n, float maximum, float scale) {
  for (int64_t i = 0; i < n; i += kLanes) {
    VecF v = load_or_infinity(x + i, n - i);
    for (int part = 0; part < kParts; ++part) {
      v.part[part] = exp2_part((v.part[part] - maximum) * scale);
    }
    store_some(y + i, n - i < kLanes ? static_cast<int>(n - i) : kLanes, v);
  }
}

void drop_below(float* x, int64_t n, float threshold) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF v = load_or_infinity(x + i, n - i);
    store_some(x + i, n - i < kLanes ? static_cast<int>(n - i) : kLanes,
               select(v >= splat(threshold), v, splat(-kInfinity)));
  }
}

template <class T>
constexpr DrawKernels<T> kernels() {
  return {maxima<T>, masses<T>, widen_allowed<T>, collect<T>, histogram<T>, collect_bucket<T>};
}

}  // namespace

extern const DrawKernels<float> kFloat32Draw = kernels<float>();
extern const DrawKernels<BFloat16> kBFloat16Draw = kernels<BFloat16>();
extern const DrawKernels<Float16> kFloat16Draw = kernels<Float16>();
extern const RaceKernels kRace = {race, log_masses, total_mass, weights, drop_below};

}  // namespace dmax::cpu::DMAX_ISA
