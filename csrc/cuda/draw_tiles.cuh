// Maximum and sum of exponentials of every draw tile (64 ids) in a warp's tile of a row, one draw
// tile per lane.
//
// A draw tile is one vector of 8 adjacent lanes (16-bit types) or of 16 (float32), so each lane
// holds a part of eight draw tiles. Three exchanges that halve what a lane still has to sum leave
// one whole sum on each lane, for 7 shuffles where eight butterflies would take 24.
#pragma once

#include "cuda/philox.cuh"
#include "cuda/tile.cuh"

namespace dmax::cuda {

template <class T>
constexpr int kDrawTileLanes = kDrawTile / kWidth<T>;
template <class T>
constexpr int kDrawTileGroups = kWarpSize / kDrawTileLanes<T>;  // draw tiles of a vector per lane
template <class T>
constexpr int kDrawTiles = kTileSize<T> / kDrawTile;  // of a tile: 32, or 16 with float32

struct DrawTile {
  float max;
  float sum;  // of exp((x - max) / temperature): 0 if all are -inf, NaN with a NaN or +inf
};

// Which of the tile's draw tiles is this lane's. With float32 two lanes have the same one, and only
// the first of them counts.
template <class T>
__device__ __forceinline__ int own_draw_tile() {
  return lane_id() % kVectors * kDrawTileGroups<T> + lane_id() / kDrawTileLanes<T>;
}
template <class T>
__device__ __forceinline__ bool counts() {
  return lane_id() % kDrawTileLanes<T> < kVectors;
}

// The value of this lane's draw tile among those of the lane's vectors
__device__ __forceinline__ float own_value(const float (&of)[kVectors]) {
  float left[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) left[v] = of[v];
#pragma unroll
  for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma unroll
    for (int v = 0; v < half; ++v) left[v] = (lane_id() & half) != 0 ? left[v + half] : left[v];
  }
  return left[0];
}

// The sum of this lane's draw tile, from those of the lane's vectors. The order of the additions is
// the same at every place of a draw tile.
template <class T>
__device__ __forceinline__ float own_sum(const float (&of)[kVectors]) {
  float left[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) left[v] = of[v];
#pragma unroll
  for (int half = kVectors / 2; half > 0; half /= 2) {
    const bool upper = (lane_id() & half) != 0;
#pragma unroll
    for (int v = 0; v < half; ++v) {
      const float given = upper ? left[v] : left[v + half];
      const float kept = upper ? left[v + half] : left[v];
      left[v] = kept + __shfl_xor_sync(kFullMask, given, half);
    }
  }
  if (kDrawTileLanes<T> > kVectors) left[0] += __shfl_xor_sync(kFullMask, left[0], kVectors);
  return left[0];
}

// Two packed elements at once
template <class T>
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t max_pair<BFloat16>(uint32_t a, uint32_t b) {
  return max_bfloat16x2(a, b);
}
template <>
__device__ __forceinline__ uint32_t max_pair<Float16>(uint32_t a, uint32_t b) {
  return max_half2(a, b);
}

// Maxima of the draw tiles that this lane's vectors belong to, NaN left out. The 16-bit types take
// two draw tiles through each shuffle.
template <class T>
__device__ __forceinline__ void draw_tile_maxima(const Tile<T>& tile, float (&maxima)[kVectors]) {
#pragma unroll
  for (int v = 0; v < kVectors; v += 2) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = v; i < v + 2; ++i) {
        maxima[i] = vector_max<T>(tile.raw[i]);
#pragma unroll
        for (int lanes = 1; lanes < kDrawTileLanes<T>; lanes *= 2)
          maxima[i] = fmaxf(maxima[i], __shfl_xor_sync(kFullMask, maxima[i], lanes));
      }
    } else {
      uint32_t halves[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4& raw = tile.raw[v + i];
        halves[i] = max_pair<T>(max_pair<T>(raw.x, raw.y), max_pair<T>(raw.z, raw.w));
      }
      uint32_t pair = max_pair<T>((halves[0] & 0xffffu) | (halves[1] << 16),
                                  (halves[0] >> 16) | (halves[1] & 0xffff0000u));
#pragma unroll
      for (int lanes = 1; lanes < kDrawTileLanes<T>; lanes *= 2)
        pair = max_pair<T>(pair, __shfl_xor_sync(kFullMask, pair, lanes));
      const uint4 both{pair, 0, 0, 0};
      maxima[v] = element<T>(both, 0);
      maxima[v + 1] = element<T>(both, 1);
    }
  }
}

template <class T>
__device__ __forceinline__ float vector_sum(const uint4& raw, const Exponent& exponent) {
  float sums[kWidth<T>];
#pragma unroll
  for (int e = 0; e < kWidth<T>; ++e) sums[e] = exp2_approx(exponent.of(element<T>(raw, e)));
#pragma unroll
  for (int half = kWidth<T> / 2; half > 0; half /= 2) {
#pragma unroll
    for (int e = 0; e < half; ++e) sums[e] += sums[e + half];
  }
  return sums[0];
}

// Each sum is relative to its own draw tile's maximum, and therefore the same in every launch and
// on every shard
template <class T>
__device__ __forceinline__ DrawTile reduce_draw_tile(const Tile<T>& tile, float scale) {
  float maxima[kVectors];
  draw_tile_maxima(tile, maxima);
  float largest_offset = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    largest_offset = fmaxf(largest_offset, fabsf(maxima[v] * scale));
  float sums[kVectors];
  if (__ballot_sync(kFullMask, largest_offset > kLargestOffset) == 0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      sums[v] = vector_sum<T>(tile.raw[v], {scale, maxima[v] * scale, 0.0f});
  } else {  // a draw tile of nothing but -inf, for example
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      sums[v] = vector_sum<T>(tile.raw[v], exponent_from(finite_reference(maxima[v]), scale));
  }
  const float max = own_value(maxima);
  const Exponent exponent = exponent_from(finite_reference(max), scale);
  return {max, own_sum<T>(sums) * exponent.factor()};
}

// log sum exp(x / temperature) of a draw tile; -inf without mass
__device__ __forceinline__ float log_mass(const DrawTile& tile, float inverse_temperature) {
  return fmaf(tile.max, inverse_temperature, logf(tile.sum));
}

}  // namespace dmax::cuda
