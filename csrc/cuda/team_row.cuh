// A row that a team of blocks searches: each of a cluster's blocks holds its tiles in shared
// memory, a single block reads them again.
#pragma once

#include "cuda/visible_row.cuh"

namespace dmax::cuda {

template <class T, bool kCluster>
struct TeamRow : VisibleRow<T> {
  using VisibleRow<T>::row;
  using VisibleRow<T>::suppress;
  using VisibleRow<T>::allowed;

  Team<kCluster> team;
  int first_tile, end_tile;  // of this block: all of the row's in a single block
  uint4* held;               // the tiles' vectors, in a cluster
  DrawTile* held_tiles;      // and their draw tiles

  float scale;  // log2(e) / temperature
  float inverse_temperature;
  float max;
  float lowest;     // of the draw tiles' maxima
  float total;      // sum of exp((x - max) / temperature)
  float mass_unit;  // see mass_unit_for()

  // ---- This block's part of the row ----

  __device__ __forceinline__ void hold(const Tile<T>& tile, int index) const {
    uint4* const place = held + (index - first_tile) * kVectors * kWarpSize + lane_id();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) place[v * kWarpSize] = tile.raw[v];
  }
  __device__ __forceinline__ DrawTile draw_tile(int index) const {
    if constexpr (kCluster) return held_tiles[index - first_tile * kDrawTiles<T>];
    return VisibleRow<T>::draw_tile(index);
  }
  __device__ __forceinline__ void put_draw_tile(int index, const DrawTile& tile,
                                                DrawTile* scratch) const {
    if constexpr (kCluster) {
      held_tiles[index - first_tile * kDrawTiles<T>] = tile;
    } else {
      scratch[index] = tile;
    }
  }

  // body(index, tile) for the draw tiles of this block that have a finite maximum, or a NaN sum
  template <class Body>
  __device__ __forceinline__ void for_draw_tiles(const Body& body) const {
    for (int i = first_tile * kDrawTiles<T> + static_cast<int>(threadIdx.x);
         i < end_tile * kDrawTiles<T>; i += kRowThreads) {
      const DrawTile tile = draw_tile(i);
      if (tile.sum != 0) body(i, tile);
    }
  }

  // A unit is one vector of every lane, kDrawTileGroups draw tiles
  static __device__ __forceinline__ int id_of(int unit, int e) {
    return (unit * kWarpSize + lane_id()) * kWidth<T> + e;
  }
  static __device__ __forceinline__ int draw_tile_of(int unit) {
    return unit * kDrawTileGroups<T> + lane_id() / kDrawTileLanes<T>;
  }
  // Elements that are not visible are -inf
  __device__ __forceinline__ uint4 load_unit(int unit) const {
    if constexpr (kCluster) return held[(unit - first_tile * kVectors) * kWarpSize + lane_id()];
    const int first = id_of(unit, 0);
    uint4 raw = load_edge_vector<T, Access::kConstant>(row, first);
    if (allowed != nullptr && first < row.vocab) {
      const uint32_t bits = allowed[first / 8] >> (first % 8);
      VisibleRow<T>::hide(raw, [&](int e, float) { return ((bits >> e) & 1) == 0; });
    }
    if (suppress >= first && suppress < first + kWidth<T>)
      VisibleRow<T>::hide(raw, [&](int e, float) { return first + e == suppress; });
    return raw;
  }

  // body(raw, unit) for every unit of this block with a draw tile whose maximum is wanted, the
  // others' elements -inf, until stop()
  template <class Wanted, class Stop, class Body>
  __device__ __forceinline__ void for_units(const Wanted& wanted, const Stop& stop,
                                            const Body& body) const {
    constexpr int kAtOnce = kCluster ? 1 : 4;  // loads in flight, where they are from memory
    const int end = end_tile * kVectors;
#pragma unroll 1
    for (int begin = first_tile * kVectors + warp_id(); begin < end; begin += kAtOnce * kRowWarps) {
      float maxima[kAtOnce];
      uint4 raw[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int unit = begin + i * kRowWarps;
        maxima[i] = unit < end ? draw_tile(draw_tile_of(unit)).max : -INFINITY;
      }
      bool any = false;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool mine = maxima[i] > -INFINITY && wanted(maxima[i]);
        raw[i] = mine ? load_unit(begin + i * kRowWarps) : VisibleRow<T>::minus_infinities();
        any = any || mine;
      }
      if (__ballot_sync(kFullMask, any) == 0) continue;
      if (stop()) return;
      if constexpr (kAtOnce == 1) {
        body(raw[0], begin);
      } else {
        // A loop, since so many copies of the body would leave the instruction cache; every vector
        // comes to the front in turn, since registers have no index
#pragma unroll 1
        for (int i = 0; i < kAtOnce; ++i) {
          if (begin + i * kRowWarps < end) body(raw[0], begin + i * kRowWarps);
#pragma unroll
          for (int next = 1; next < kAtOnce; ++next) raw[next - 1] = raw[next];
        }
      }
    }
  }

  // The statistics of the draw tile that this lane's vector belongs to, with the bits of
  // reduce_draw_tile()
  __device__ __forceinline__ DrawTile reduce_unit(const uint4& raw) const {
    float largest = vector_max<T>(raw);
#pragma unroll
    for (int lanes = 1; lanes < kDrawTileLanes<T>; lanes *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, lanes));
    const Exponent exponent = exponent_from(finite_reference(largest), scale);
    float sum = vector_sum<T>(raw, exponent);
#pragma unroll
    for (int lanes = kVectors / 2; lanes > 0; lanes /= 2)
      sum += __shfl_xor_sync(kFullMask, sum, lanes);
    if (kDrawTileLanes<T> > kVectors) sum += __shfl_xor_sync(kFullMask, sum, kVectors);
    return {largest, sum * exponent.factor()};
  }

  // Fixed point with room for the sum of all masses, each at most 1: 2^62 over a power of two above
  // the number of ids
  static __device__ __forceinline__ float mass_unit_for(int vocab) {
    const int bits = 30 + __clz(vocab);
    return __uint_as_float(static_cast<uint32_t>(127 + bits) << 23);
  }
  // Of all elements of a draw tile
  __device__ __forceinline__ uint64_t mass_of(const DrawTile& tile) const {
    return static_cast<uint64_t>(tile.sum * exp2_approx((tile.max - max) * scale) * mass_unit);
  }
  __device__ __forceinline__ float to_sum(uint64_t mass) const {
    return static_cast<float>(mass) / mass_unit;
  }
  __device__ __forceinline__ uint64_t mass_of(float x) const {
    return static_cast<uint64_t>(exp2_approx((x - max) * scale) * mass_unit);
  }
};

}  // namespace dmax::cuda
