// A row's vocabulary in tiles of 4 KB, one warp per tile: the fixed grain of every sum over a row.
//
// Lane l's v-th vector of a tile holds the elements [(v * 32 + l) * width, ... + width), whatever
// the alignment of the row and whichever warp works on the tile. A tile's statistics therefore have
// the same bits in every launch. So do the row's: tiles are merged in an order that depends only on
// how many there are (rows.cuh).
#pragma once

#include "common/softmax_stats.h"
#include "cuda/elements.cuh"

namespace dmax::cuda {

constexpr int kVectors = 8;  // 16-byte loads in flight per lane

template <class T>
constexpr int kTileSize = kWarpSize * kVectors * kWidth<T>;

template <class T>
struct Row {
  const T* data;
  int vocab;
  bool aligned;  // data is a multiple of 16 bytes
};

template <class T>
__device__ __forceinline__ Row<T> make_row(const T* data, int vocab) {
  return {data, vocab, aligned_16(data)};
}

template <class T>
struct Tile {
  uint4 raw[kVectors];
  int begin;  // id of its first element

  // Id of element e of this lane's vector v
  __device__ __forceinline__ int id(int v, int e) const {
    return begin + (v * kWarpSize + lane_id()) * kWidth<T> + e;
  }
  __device__ __forceinline__ float at(int v, int e) const { return element<T>(raw[v], e); }
};

// When the kernel writes to the row that it reads
enum class Access {
  kConstant,     // never: the loads may take the read-only path
  kReadFirst,    // after all of the row has been read
  kInterleaved,  // other elements at any time: a load may then touch no neighbour
};

template <Access kAccess>
__device__ __forceinline__ uint4 load_vector(const void* p) {
  return kAccess == Access::kConstant ? load_constant(p) : *static_cast<const uint4*>(p);
}

// Sixteen bytes from any address: the two aligned vectors around it, shifted together. Both must
// lie inside the row.
template <Access kAccess>
__device__ __forceinline__ uint4 load_shifted(const char* p) {
  const auto offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) & 15);
  const uint4 low = load_vector<kAccess>(p - offset);
  const uint4 high = load_vector<kAccess>(p - offset + 16);
  const bool by_8 = (offset & 8) != 0;
  const bool by_4 = (offset & 4) != 0;
  const uint32_t a0 = by_8 ? low.z : low.x, a1 = by_8 ? low.w : low.y;
  const uint32_t a2 = by_8 ? high.x : low.z, a3 = by_8 ? high.y : low.w;
  const uint32_t a4 = by_8 ? high.z : high.x, a5 = by_8 ? high.w : high.y;
  const uint32_t b0 = by_4 ? a1 : a0, b1 = by_4 ? a2 : a1, b2 = by_4 ? a3 : a2;
  const uint32_t b3 = by_4 ? a4 : a3, b4 = by_4 ? a5 : a4;
  const uint32_t bits = (offset & 3) * 8;
  return {__funnelshift_r(b0, b1, bits), __funnelshift_r(b1, b2, bits),
          __funnelshift_r(b2, b3, bits), __funnelshift_r(b3, b4, bits)};
}

// One vector of a row that is not aligned or ends inside the tile; elements past the end are -inf
template <class T, Access kAccess>
__device__ __forceinline__ uint4 load_edge_vector(const Row<T>& row, int first) {
  const T* p = row.data + first;
  const bool whole = first + kWidth<T> <= row.vocab;
  if (whole && row.aligned) return load_vector<kAccess>(p);
  uint4 raw{0, 0, 0, 0};
  if (first >= row.vocab) {  // no element by element: rows often end between two vectors
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) set_element_bits<T>(raw, e, minus_infinity_bits<T>());
    return raw;
  }
  // The aligned vectors around p reach less than one vector to either side of it
  if (kAccess != Access::kInterleaved && whole && first >= kWidth<T> &&
      first + 2 * kWidth<T> <= row.vocab)
    return load_shifted<kAccess>(reinterpret_cast<const char*>(p));
#pragma unroll
  for (int e = 0; e < kWidth<T>; ++e) {
    const bool inside = first + e < row.vocab;
    set_element_bits<T>(raw, e, inside ? bits_of(p[e]) : minus_infinity_bits<T>());
  }
  return raw;
}

// Makes an id of the row -inf, if it lies in this tile; -1 for none
template <class T>
__device__ __forceinline__ void suppress_in(Tile<T>& tile, int suppress) {
  const int place = suppress - tile.begin;
  if (place >= 0 && place < kTileSize<T> && suppress >= 0) {
    if (place / kWidth<T> % kWarpSize == lane_id()) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < kWidth<T>; ++e)
          if (tile.id(v, e) == suppress)
            set_element_bits<T>(tile.raw[v], e, minus_infinity_bits<T>());
      }
    }
  }
}

// `suppress` is an id to be read as -inf, or -1
template <class T, Access kAccess = Access::kConstant>
__device__ __forceinline__ void load_tile(Tile<T>& tile, const Row<T>& row, int index,
                                          int suppress) {
  tile.begin = index * kTileSize<T>;
  if (row.aligned && tile.begin + kTileSize<T> <= row.vocab) {
    const T* p = row.data + tile.begin + lane_id() * kWidth<T>;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      tile.raw[v] = load_vector<kAccess>(p + v * kWarpSize * kWidth<T>);
  } else {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      tile.raw[v] = load_edge_vector<T, kAccess>(row, tile.id(v, 0));
  }
  suppress_in(tile, suppress);
}

// `skipped`, in a place that no compiler moves to before the tile's loads
template <class T>
__device__ __forceinline__ bool skipped_after_loads(Tile<T>& tile, bool skipped) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) forget(tile.raw[v]);
  return skipped;
}

// ---- Statistics of a tile: the same on every lane ----

// The largest element of each of this lane's vectors, NaN left out
template <class T>
struct VectorMaxima {
  float of[kVectors];
  float lane;
};

template <class T>
__device__ __forceinline__ VectorMaxima<T> vector_maxima(const Tile<T>& tile) {
  VectorMaxima<T> maxima;
  maxima.lane = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    maxima.of[v] = vector_max<T>(tile.raw[v]);
    maxima.lane = fmaxf(maxima.lane, maxima.of[v]);
  }
  return maxima;
}

// This lane's first element that equals its maximum; kNoId if it has only NaN
template <class T>
__device__ __forceinline__ int lane_argmax(const Tile<T>& tile, const VectorMaxima<T>& maxima) {
  uint4 chosen{0, 0, 0, 0};
  int vector = -1;
#pragma unroll
  for (int v = kVectors - 1; v >= 0; --v) {
    if (maxima.of[v] == maxima.lane) {
      chosen = tile.raw[v];
      vector = v;
    }
  }
  int id = kNoId;
#pragma unroll
  for (int e = kWidth<T> - 1; e >= 0; --e)
    if (element<T>(chosen, e) == maxima.lane) id = tile.id(vector, e);
  return vector < 0 ? kNoId : id;
}

__device__ __forceinline__ int warp_first(int id) {
  return static_cast<int>(__reduce_min_sync(kFullMask, static_cast<uint32_t>(id)));
}

// The ids of a row that are read as -inf, `hidden` below, are one suppressed id, or -1 for none, or
// those of a mask besides it (mask.cuh)
__device__ __forceinline__ bool is_hidden(int suppress, int id) { return id == suppress; }

// The tile's first element for which is(x), or kNoId. It is rarely needed and therefore reads the
// row again: keeping the elements would cost registers.
template <class T, class Hidden, class Is>
__device__ __forceinline__ int first_where(const Row<T>& row, int begin, const Hidden& hidden,
                                           const Is& is) {
  int first = kNoId;
  for (int id = begin + lane_id(); id < begin + kTileSize<T> && id < row.vocab; id += kWarpSize)
    if (first == kNoId && !is_hidden(hidden, id) && is(to_float(row.data[id]))) first = id;
  return warp_first(first);
}

// What is subtracted before the exponential: -inf - -inf would be NaN
__device__ __forceinline__ float finite_reference(float max) {
  return max == -INFINITY ? 0.0f : max;
}

// 2^((x - reference) * scale) is 2^(x * scale - offset), times `correction` for what the product
// reference * scale lost to become `offset`. An exponent takes one instruction and one rounding,
// and the logits keep their digits under a large common offset.
struct Exponent {
  float scale;
  float offset;      // reference * scale, rounded
  float correction;  // in exponents: add it to x * scale - offset

  __device__ __forceinline__ float of(float x) const { return fmaf(x, scale, -offset); }
  __device__ __forceinline__ float factor() const { return exp2_approx(correction); }
};

// A correction is at most 2^-24 of its offset, hence 64: no power of 2 here overflows. Beyond that
// offset the scale is lowered to it. Every element but those at the reference then has an exponent
// of at most -64 instead of a lower one, and either vanishes beside the 1 of the maximum.
constexpr float kLargestOffset = 0x1p30f;

__device__ __forceinline__ Exponent exponent_from(float reference, float scale) {
  if (!(fabsf(reference * scale) <= kLargestOffset)) scale = kLargestOffset / fabsf(reference);
  const float offset = reference * scale;
  return {scale, offset, -fmaf(reference, scale, -offset)};
}

// What one walk over a tile's elements finds
struct TileSums {
  float below;   // sum of 2^(x * scale - offset) over the elements below max, on every lane
  float others;  // number of elements at max, minus one, on every lane
  int first;     // id of this lane's first element at max, or kNoId

  __device__ __forceinline__ float rest(const Exponent& exponent) const {
    return fmaf(below, exponent.factor(), others);
  }
};

// also(v, e, t, weight) lets an op sum something else on the way, for element e of this lane's
// vector v: t is its exponent, x * scale - offset, and weight is 2^t, or 0 at max.
template <class T, class Also>
__device__ __forceinline__ TileSums tile_sums(const Tile<T>& tile, const VectorMaxima<T>& maxima,
                                              float max, const Exponent& exponent,
                                              const Also& also) {
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  float at_max = 0.0f;
  int first = kNoId;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (maxima.of[v] == max) {  // few of the tile's 256 vectors
      int place = 0;
#pragma unroll
      for (int e = kWidth<T> - 1; e > 0; --e)
        if (tile.at(v, e) == max) place = e;
      if (tile.at(v, 0) == max) place = 0;
      first = min(first, tile.id(v, place));
#pragma unroll
      for (int e = 0; e < kWidth<T>; ++e) {
        const float x = tile.at(v, e);
        const float t = exponent.of(x);
        float weight = 0.0f;
        if (x == max) {
          at_max += 1.0f;
        } else {
          weight = exp2_approx(t);
          sums[e % 4] += weight;
        }
        also(v, e, t, weight);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kWidth<T>; ++e) {
        const float t = exponent.of(tile.at(v, e));
        const float weight = exp2_approx(t);
        sums[e % 4] += weight;
        also(v, e, t, weight);
      }
    }
  }
  const float others = warp_sum(at_max) - 1.0f;
  return {warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3])), others, first};
}

struct NothingElse {
  template <class... Arguments>
  __device__ __forceinline__ void operator()(const Arguments&...) const {}
};

// Sets max and id of a tile whose sum is NaN: its first NaN, or else its first +inf
template <class T, class Hidden>
__device__ __forceinline__ void find_broken(const Tile<T>& tile, const Row<T>& row,
                                            const Hidden& hidden, SoftmaxStats* stats) {
  stats->id = first_where(row, tile.begin, hidden, [](float x) { return x != x; });
  if (stats->id != kNoId) {
    stats->max = NAN;
  } else {
    stats->id = first_where(row, tile.begin, hidden, [](float x) { return x == INFINITY; });
  }
}

template <class T, class Hidden>
__device__ __forceinline__ SoftmaxStats tile_stats(const Tile<T>& tile, const Row<T>& row,
                                                   const Hidden& hidden, float max,
                                                   const Exponent& exponent, const TileSums& sums) {
  SoftmaxStats stats{max, sums.rest(exponent), warp_first(sums.first)};
  if (stats.rest != stats.rest) find_broken(tile, row, hidden, &stats);
  return stats;
}

template <class T, class Hidden>
__device__ __forceinline__ SoftmaxStats tile_stats(const Tile<T>& tile, const Row<T>& row,
                                                   const Hidden& hidden, float scale) {
  const VectorMaxima<T> maxima = vector_maxima(tile);
  const float max = warp_max(maxima.lane);
  const Exponent exponent = exponent_from(finite_reference(max), scale);
  const TileSums sums = tile_sums(tile, maxima, max, exponent, NothingElse{});
  return tile_stats(tile, row, hidden, max, exponent, sums);
}

}  // namespace dmax::cuda
