// A row whose elements are read where they are allowed and their draw tile is wanted, and nowhere
// else.
#pragma once

#include "cuda/draw_tiles.cuh"
#include "cuda/filter_block.cuh"

namespace dmax::cuda {

// One row, for the block that has all of its draw tiles
template <class T>
struct VisibleRow {
  Row<T> row;
  int suppress;
  const uint8_t* allowed;  // null: every id
  const DrawTile* tiles;   // [row_tiles, kDrawTiles]
  int row_tiles;

  __device__ __forceinline__ DrawTile draw_tile(int index) const {
    const uint64_t bits = load_other_block_8(reinterpret_cast<const uint64_t*>(tiles) + index);
    DrawTile tile;
    memcpy(&tile, &bits, sizeof(tile));
    return tile;
  }
  __device__ __forceinline__ int num_draw_tiles() const { return row_tiles * kDrawTiles<T>; }

  // A bit for each id of this lane's vector v; those past the end mean nothing
  __device__ __forceinline__ uint32_t allowed_bits(const Tile<T>& tile, int v) const {
    const int first = tile.id(v, 0);
    if (allowed == nullptr) return 0xffu;
    if (first >= row.vocab) return 0;
    constexpr uint32_t kVectorBits = (1u << kWidth<T>)-1u;
    return (allowed[first / 8] >> (first % 8)) & kVectorBits;
  }
  __device__ __forceinline__ bool is_visible(int id) const {
    return id != suppress && (allowed == nullptr || ((allowed[id / 8] >> (id % 8)) & 1) != 0);
  }

  // The elements of the draw tiles in `wanted`, one bit each, -inf where they are not visible.
  // Nothing else is read.
  __device__ __forceinline__ void load(Tile<T>& tile, int index, uint32_t wanted) const {
    tile.begin = index * kTileSize<T>;
    const bool whole = row.aligned && tile.begin + kTileSize<T> <= row.vocab;
    uint64_t bits = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int place = v * kDrawTileGroups<T> + lane_id() / kDrawTileLanes<T>;
      if ((wanted >> place) & 1) bits |= static_cast<uint64_t>(allowed_bits(tile, v)) << (8 * v);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint4& raw = tile.raw[v];
      if ((bits >> (8 * v) & 0xffu) == 0) {
        raw = minus_infinities();
      } else if (whole) {
        raw = load_constant(row.data + tile.id(v, 0));
      } else {
        raw = load_edge_vector<T, Access::kConstant>(row, tile.id(v, 0));
      }
    }
    if (allowed != nullptr)
      for_vectors(tile, [&](uint4& raw, int v) {
        hide(raw, [&](int e, float) { return (bits >> (8 * v + e) & 1) == 0; });
      });
    suppress_in(tile, suppress);
  }
  static __device__ __forceinline__ uint4 minus_infinities() {
    uint4 raw{0, 0, 0, 0};
    hide(raw, [](int, float) { return true; });
    return raw;
  }
  // Makes the elements for which hidden(e, x) -inf
  template <class Hidden>
  static __device__ __forceinline__ void hide(uint4& raw, const Hidden& hidden) {
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e)
      if (hidden(e, element<T>(raw, e))) set_element_bits<T>(raw, e, minus_infinity_bits<T>());
  }

  // body(raw, v) for this lane's vectors, as a loop: every vector comes to the front in turn, since
  // registers have no index, and eight copies of a long body would leave the instruction cache
  template <class Body>
  static __device__ __forceinline__ void for_vectors(Tile<T>& tile, const Body& body) {
#pragma unroll 1
    for (int v = 0; v < kVectors; ++v) {
      uint4 front = tile.raw[0];
      body(front, v);
#pragma unroll
      for (int i = 1; i < kVectors; ++i) tile.raw[i - 1] = tile.raw[i];
      tile.raw[kVectors - 1] = front;
    }
  }

  // body(tile, index) for every tile with a draw tile whose maximum is wanted, until stop()
  template <class Wanted, class Stop, class Body>
  __device__ __forceinline__ void for_tiles(const Wanted& wanted, const Stop& stop,
                                            const Body& body) const {
#pragma unroll 1
    for (int t = warp_id(); t < row_tiles; t += kRowWarps) {
      bool mine = false;
      if (lane_id() < kDrawTiles<T>) {
        const float tile_max = draw_tile(t * kDrawTiles<T> + lane_id()).max;
        mine = tile_max > -INFINITY && wanted(tile_max);
      }
      const uint32_t active = __ballot_sync(kFullMask, mine);
      if (active == 0) continue;
      if (__ballot_sync(kFullMask, stop()) != 0) return;
      Tile<T> tile;
      load(tile, t, active);
      body(tile, t);
    }
  }

  // The first id for which is(x), by the whole block; kNoId if there is none
  template <class Is>
  __device__ __forceinline__ int first_id(int begin, int end, const Is& is) const {
    int first = kNoId;
    for (int id = begin + static_cast<int>(threadIdx.x); id < min(end, row.vocab);
         id += kRowThreads)
      if (first == kNoId && is_visible(id) && is(to_float(row.data[id]))) first = id;
    return block_min(first);
  }
};

}  // namespace dmax::cuda
