// Rows of which a mask allows some ids: the others are read as -inf, or not at all.
//
// The mask has a bit per id, bit v % 32 of word v / 32. A warp first loads the bits of its tile.
// Vectors without an allowed id are not loaded, and a tile whose ids are all allowed pays nothing
// more: of a mask of a few suppressed ids that is nearly every tile, and of a grammar's mask most
// vectors are of the first kind. Kernels for masked rows are instantiations of their own, since the
// others must not wait for a mask.
#pragma once

#include <type_traits>

#include "cuda/tile.cuh"

namespace dmax::cuda {

// In place of an element type T, for logits with a mask: LogitsView<Masked<T>>, and the kernels
// that take one
template <class T>
struct Masked {};

template <class In>
struct RowElement {
  using type = In;
};
template <class T>
struct RowElement<Masked<T>> {
  using type = T;
};
template <class In>
using ElementOf = typename RowElement<In>::type;
template <class In>
constexpr bool kIsMasked = !std::is_same_v<In, ElementOf<In>>;

// The hidden ids of one row
struct MaskedIds {
  int suppress;            // one id, or -1
  const uint8_t* allowed;  // the row's bits
};

__device__ __forceinline__ bool is_hidden(const MaskedIds& hidden, int id) {
  return id == hidden.suppress || ((hidden.allowed[id / 8] >> (id % 8)) & 1) == 0;
}

// All ones at the elements of word i of a vector whose bits are set
template <class T>
__device__ __forceinline__ uint32_t kept_bits(uint32_t bits, int i) {
  if (sizeof(T) == 4) return 0u - ((bits >> i) & 1u);
  const uint32_t pair = bits >> (2 * i);
  return ((pair & 1u) | ((pair & 2u) << 15)) * 0xffffu;
}

template <class T>
__device__ __forceinline__ uint32_t minus_infinity_word() {
  const uint32_t bits = minus_infinity_bits<T>();
  return sizeof(T) == 4 ? bits : bits | (bits << 16);
}

template <class T>
__device__ __forceinline__ void load_tile(Tile<T>& tile, const Row<T>& row, int index,
                                          const MaskedIds& hidden) {
  constexpr uint32_t kAllBits = (1u << kWidth<T>)-1u;
  tile.begin = index * kTileSize<T>;
  uint32_t bits[kVectors];
  bool all = true;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = tile.id(v, 0);
    bits[v] = 0;
    if (first < row.vocab) bits[v] = (hidden.allowed[first / 8] >> (first % 8)) & kAllBits;
    all = all && bits[v] == kAllBits;
  }
  if (row.aligned && tile.begin + kTileSize<T> <= row.vocab) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      tile.raw[v] = uint4{0, 0, 0, 0};
      if (bits[v] != 0) tile.raw[v] = load_constant(row.data + tile.id(v, 0));
    }
  } else {
    all = false;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      tile.raw[v] = uint4{0, 0, 0, 0};
      if (bits[v] != 0) tile.raw[v] = load_edge_vector<T, Access::kConstant>(row, tile.id(v, 0));
    }
  }
  if (__ballot_sync(kFullMask, all) != kFullMask) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t kept = kept_bits<T>(bits[v], i);
        set_word(tile.raw[v], i,
                 (word(tile.raw[v], i) & kept) | (minus_infinity_word<T>() & ~kept));
      }
    }
  }
  suppress_in(tile, hidden.suppress);
}

}  // namespace dmax::cuda
