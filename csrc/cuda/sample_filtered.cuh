// sample_tokens with top_k, top_p, min_p, a mask of allowed ids, or options per row.
//
// All blocks of a row read it once and leave the maximum and the mass of every draw tile. The
// row's last block then finds the cut, the last token that the filters keep, in the order of the
// logits (descending, equal ones by id). Every filter keeps a prefix of that order. The draw tiles'
// maxima bound the cut from below, and only tiles that reach above the bound are read again: few on
// a peaked row, up to all of them on a flat one. What is left after the cut is drawn as always.
//
// The search counts tokens and adds up masses in fixed point, so no order of additions shows in
// the result. First it lists all tokens above the bound, which suffices if the list holds them. If
// not, a histogram finds the bin that the cut is in, and that bin is listed.
#pragma once

#include "common/draw_options.h"
#include "cuda/sample.cuh"
#include "cuda/top_list.cuh"

namespace dmax::cuda {

constexpr int kFilteredResident = 2;  // blocks per multiprocessor: 128 registers a thread
constexpr int kBins = 1024;
constexpr int kListed = 2048;

struct FilteredDraw {
  DrawOptions options;       // of every row, if row_options is null
  const float* row_options;  // [rows, 4]
  const uint32_t* allowed;   // a bit per id; null: every id
  int64_t allowed_stride;    // words from a row's bits to the next row's; 0: one mask for all
  DrawTile* tiles;           // [rows, tiles of a row, kDrawTiles], scratch

  __device__ __forceinline__ DrawOptions of_row(int64_t row) const {
    return row_options != nullptr ? draw_options_of(row_options, row) : options;
  }
};

struct FilteredShared {
  unsigned count[kBins], mass_low[kBins], mass_high[kBins];
  Rank list[kListed];
  unsigned listed;
  uint64_t of_warps[kRowWarps];
  // What reach() found
  int found;
  uint64_t count_before, mass_before, mass_through;
  double target;
};

__device__ __forceinline__ FilteredShared& filtered_shared() {
  __shared__ FilteredShared shared;
  return shared;
}

// combine() is associative and commutative; the result is the same on every thread
template <class Value, class Combine>
__device__ __forceinline__ Value block_reduce(Value mine, const Combine& combine) {
  static_assert(sizeof(Value) <= sizeof(uint64_t), "a shuffle");
  FilteredShared& shared = filtered_shared();
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    mine = combine(mine, __shfl_xor_sync(kFullMask, mine, lanes));
  if (lane_id() == 0) memcpy(&shared.of_warps[warp_id()], &mine, sizeof(Value));
  __syncthreads();
  Value all;
  memcpy(&all, &shared.of_warps[0], sizeof(Value));
#pragma unroll
  for (int warp = 1; warp < kRowWarps; ++warp) {
    Value other;
    memcpy(&other, &shared.of_warps[warp], sizeof(Value));
    all = combine(all, other);
  }
  __syncthreads();
  return all;
}

__device__ __forceinline__ float block_max(float mine) {
  return block_reduce(mine, [](float a, float b) { return fmaxf(a, b); });
}
__device__ __forceinline__ float block_min(float mine) {
  return block_reduce(mine, [](float a, float b) { return fminf(a, b); });
}
__device__ __forceinline__ int block_min(int mine) {
  return block_reduce(mine, [](int a, int b) { return min(a, b); });
}
__device__ __forceinline__ uint64_t block_max(uint64_t mine) {
  return block_reduce(mine, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}
template <class Value>
__device__ __forceinline__ Value block_sum(Value mine) {
  return block_reduce(mine, [](Value a, Value b) { return a + b; });
}

// The tokens that the filters keep
struct Kept {
  Rank cut;   // the last of them
  float max;  // of the row
  float inverse_temperature;
  float least_depth;  // log(min_p); -inf: off

  __device__ __forceinline__ bool deep(float x) const {
    return (x - max) * inverse_temperature < least_depth;
  }
  __device__ __forceinline__ bool operator()(int id, float x) const {
    return rank_of(x, id) >= cut && !deep(x);
  }
  // Whether a draw tile with this maximum may hold one of them
  __device__ __forceinline__ bool in_tile(float tile_max) const { return (*this)(0, tile_max); }
};

// One row, for the block that has all of its draw tiles
template <class T>
struct FilteredRow {
  Row<T> row;
  int suppress;
  const uint8_t* allowed;  // null: every id
  const DrawTile* tiles;   // [row_tiles, kDrawTiles]
  int row_tiles;
  float scale;  // log2(e) / temperature
  float inverse_temperature;
  float max;
  float total;  // sum of exp((x - max) / temperature)

  // Bins of equal width in the order of the logits, from max on; the last one has no end
  float bins_per_unit;

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

  // Fixed point with room for the sum of all masses, each at most 1
  __device__ __forceinline__ float mass_unit() const {
    int bits = 62;
    for (int ids = row.vocab; ids > 0; ids /= 2) --bits;
    return __uint_as_float(static_cast<uint32_t>(127 + bits) << 23);
  }
  __device__ __forceinline__ uint64_t mass_of(float x) const {
    return static_cast<uint64_t>(exp2_approx((x - max) * scale) * mass_unit());
  }

  // Rises as x falls, whatever the rounding
  __device__ __forceinline__ int bin_of(float x) const {
    return static_cast<int>(fminf((max - x) * bins_per_unit, static_cast<float>(kBins - 1)));
  }

  static __device__ __forceinline__ void clear_bins() {
    FilteredShared& shared = filtered_shared();
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kRowThreads)
      shared.count[i] = shared.mass_low[i] = shared.mass_high[i] = 0;
    __syncthreads();
  }
  static __device__ __forceinline__ void add(int bin, uint64_t mass) {
    FilteredShared& shared = filtered_shared();
    atomicAdd(&shared.count[bin], 1u);
    const auto low = static_cast<unsigned>(mass);
    const unsigned sum = atomicAdd(&shared.mass_low[bin], low) + low;
    const unsigned high = static_cast<unsigned>(mass >> 32) + (sum < low ? 1u : 0u);
    if (high != 0) atomicAdd(&shared.mass_high[bin], high);
  }

  struct Reach {
    bool of_list;  // the sorted list's tokens in turn, else the bins
    bool by_mass;
    double target;    // a count or a mass; set here if
    double fraction;  // is below 1: that part of the mass of all entries and of `outside`
    uint64_t outside;
    uint64_t count_before, mass_before;
  };

  // Sets shared.found to the first entry with which the running count, or mass, reaches the target,
  // or to the number of entries. All threads call it, one warp works.
  __device__ __forceinline__ void reach(Reach search) const {
    FilteredShared& shared = filtered_shared();
    __syncthreads();
    if (warp_id() == 0) {
      const auto mass_at = [&](int i) {
        return search.of_list
                   ? mass_of(value_of(shared.list[i]))
                   : static_cast<uint64_t>(shared.mass_high[i]) << 32 | shared.mass_low[i];
      };
      const auto count_at = [&](int i) { return search.of_list ? 1u : shared.count[i]; };
      const int n = search.of_list ? static_cast<int>(shared.listed) : kBins;
      const int each = (n + kWarpSize - 1) / kWarpSize;
      const int begin = min(lane_id() * each, n);
      const int end = min(begin + each, n);
      uint64_t counts = 0, masses = 0;
      for (int i = begin; i < end; ++i) {
        counts += count_at(i);
        masses += mass_at(i);
      }
      uint64_t count = counts, mass = masses;  // of this lane and those below it
#pragma unroll
      for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
        const uint64_t count_below = __shfl_up_sync(kFullMask, count, lanes);
        const uint64_t mass_below = __shfl_up_sync(kFullMask, mass, lanes);
        if (lane_id() >= lanes) {
          count += count_below;
          mass += mass_below;
        }
      }
      const uint64_t all = __shfl_sync(kFullMask, mass, kWarpSize - 1) + search.outside;
      if (search.fraction < 1) search.target = search.fraction * static_cast<double>(all);
      count += search.count_before;
      mass += search.mass_before;
      const auto reached = [&] {
        return static_cast<double>(search.by_mass ? mass : count) >= search.target;
      };
      const uint32_t lanes = __ballot_sync(kFullMask, reached());
      if (lane_id() == 0) {
        shared.target = search.target;
        if (lanes == 0) shared.found = n;
      }
      if (lanes != 0 && lane_id() == __ffs(lanes) - 1) {
        count -= counts;
        mass -= masses;
        for (int i = begin; i < end; ++i) {
          shared.count_before = count;
          shared.mass_before = mass;
          count += count_at(i);
          mass += mass_at(i);
          shared.found = i;
          shared.mass_through = mass;
          if (reached()) break;
        }
      }
    }
    __syncthreads();
  }

  static __device__ __forceinline__ void clear_list() {
    if (threadIdx.x == 0) filtered_shared().listed = 0;
    __syncthreads();
  }
  static __device__ __forceinline__ void put_on_list(Rank rank) {
    FilteredShared& shared = filtered_shared();
    const unsigned place = atomicAdd(&shared.listed, 1u);
    if (place < kListed) shared.list[place] = rank;
  }
  static __device__ __forceinline__ bool list_is_full() {
    return lane_id() == 0 && atomicAdd(&filtered_shared().listed, 0u) > kListed;
  }

  // Best first: a bitonic sort, padded with rank 0, which no element has
  static __device__ __forceinline__ void sort_list() {
    FilteredShared& shared = filtered_shared();
    __syncthreads();
    const auto n = static_cast<int>(shared.listed);
    int size = 2;
    while (size < n) size *= 2;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = n + thread; i < size; i += kRowThreads) shared.list[i] = 0;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
      for (int step = run / 2; step > 0; step /= 2) {
        for (int i = thread; i < size / 2; i += kRowThreads) {
          const int low = 2 * i - (i & (step - 1));
          const Rank a = shared.list[low];
          const Rank b = shared.list[low + step];
          if ((a < b) == ((low & run) == 0)) {
            shared.list[low] = b;
            shared.list[low + step] = a;
          }
        }
        __syncthreads();
      }
    }
  }

  // ---- The search for the cut ----

  struct Selected {
    Rank cut;       // 0: every token
    uint64_t mass;  // of the tokens up to the cut
  };

  enum class Pass {
    kListAll,  // lists every token above the bound
    kBins,     // finds the bin that the cut is in
    kBounds,   // more tokens lie in it than the list holds, such as equal ones: their ranks' range
    kNarrow,   // narrower bins, of ranks
    kListBin,  // lists the tokens of that bin
  };

  // The cut at which the count, or the mass in units of mass_unit(), first reaches the target. A
  // fraction below 1 sets the target: that part of all the row's mass.
  __device__ __forceinline__ Selected select(bool by_mass, double target, double fraction) const {
    FilteredShared& shared = filtered_shared();

    // The maxima alone reach the target in this bin at the latest
    clear_bins();
    for (int i = static_cast<int>(threadIdx.x); i < num_draw_tiles(); i += kRowThreads) {
      const float tile_max = draw_tile(i).max;
      if (tile_max > -INFINITY) add(bin_of(tile_max), mass_of(tile_max));
    }
    const double approximately = 1.00001 * static_cast<double>(total) * mass_unit();
    reach({false, by_mass, fraction < 1 ? fraction * approximately : target, 1.0, 0, 0, 0});
    int deepest = min(shared.found, kBins - 1);

    uint64_t outside = 0;  // the mass of the tiles that stay below
    for (int i = static_cast<int>(threadIdx.x); i < num_draw_tiles(); i += kRowThreads) {
      const DrawTile tile = draw_tile(i);
      if (tile.max > -INFINITY && bin_of(tile.max) > deepest)
        outside +=
            static_cast<uint64_t>(tile.sum * exp2_approx((tile.max - max) * scale) * mass_unit());
    }
    outside = block_sum(outside);

    uint64_t count_before = 0;
    uint64_t mass_before = 0;
    Rank first = ~Rank{0};
    Rank last = 0;
    int shift = 0;
    Pass pass = Pass::kListAll;
#pragma unroll 1
    for (;;) {
      const bool lists = pass == Pass::kListAll || pass == Pass::kListBin;
      if (lists) {
        clear_list();
      } else {
        clear_bins();
      }
      uint64_t unlisted = 0;
      Rank highest = 0;
      Rank lowest = ~Rank{0};
      for_tiles([&](float tile_max) { return bin_of(tile_max) <= deepest; },
                [&] { return lists && list_is_full(); },
                [&](Tile<T>& tile, int) {
                  for_vectors(tile, [&](uint4& raw, int v) {
#pragma unroll
                    for (int e = 0; e < kWidth<T>; ++e) {
                      const float x = element<T>(raw, e);
                      if (x == -INFINITY) continue;
                      const int bin = bin_of(x);
                      if (pass == Pass::kBins) {
                        add(bin, mass_of(x));
                        continue;
                      }
                      if (pass == Pass::kListAll && bin > deepest) unlisted += mass_of(x);
                      if (pass == Pass::kListAll ? bin > deepest : bin != deepest) continue;
                      const Rank rank = rank_of(x, tile.id(v, e));
                      if (rank > first || rank < last) continue;
                      if (lists) {
                        put_on_list(rank);
                      } else if (pass == Pass::kNarrow) {
                        add(static_cast<int>((first - rank) >> shift), mass_of(x));
                      } else {
                        highest = rank > highest ? rank : highest;
                        lowest = rank < lowest ? rank : lowest;
                      }
                    }
                  });
                });
      __syncthreads();

      if (lists && shared.listed <= kListed) {
        outside += block_sum(unlisted);
        sort_list();
        reach({true, by_mass, target, fraction, outside, count_before, mass_before});
        const int place = shared.found;
        const Selected selected = place < static_cast<int>(shared.listed)
                                      ? Selected{shared.list[place], shared.mass_through}
                                      : Selected{0, 0};
        __syncthreads();
        return selected;
      }
      if (lists) {
        pass = Pass::kBins;
        continue;
      }
      if (pass == Pass::kBounds) {
        first = block_max(highest);
        last = ~block_max(~lowest);
      } else {
        reach({false, by_mass, target, fraction, outside, count_before, mass_before});
        const int bin = shared.found;
        if (bin == kBins) return {0, 0};
        target = shared.target;
        fraction = 1.0;
        count_before = shared.count_before;
        mass_before = shared.mass_before;
        if (pass == Pass::kBins) {
          deepest = bin;
        } else {
          first -= static_cast<Rank>(bin) << shift;
          const Rank width = (Rank{1} << shift) - 1;
          last = first - last > width ? first - width : last;
        }
        const bool fits = shared.count[bin] <= kListed;
        __syncthreads();
        if (fits) {
          pass = Pass::kListBin;
          continue;
        }
        if (pass == Pass::kBins) {
          pass = Pass::kBounds;
          continue;
        }
      }
      pass = Pass::kNarrow;
      shift = 0;
      while ((first - last) >> shift >= kBins) ++shift;
    }
  }

  // `options` has a filter on
  __device__ __forceinline__ Kept keep(const DrawOptions& options) {
    const float top_p = static_cast<float>(options.top_p);
    Selected selected{0, 0};
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
      const bool by_mass = filter == 1;
      double target = options.top_k;
      double fraction = 1.0;
      if (by_mass) {
        if (!(top_p < 1)) continue;
        // All tokens further than this below max have together less than 1 - top_p of its mass
        const float depth = logf(static_cast<float>(row.vocab) / (1.0f - top_p)) + 1.0f;
        bins_per_unit = fminf(kBins * inverse_temperature / depth, 3e38f);
        if (selected.cut == 0) {
          fraction = top_p;
        } else {
          target = static_cast<double>(top_p) * static_cast<double>(selected.mass);
        }
      } else {
        if (!(options.top_k > 0 && options.top_k < row.vocab)) continue;
        float lowest = INFINITY;
        for (int i = static_cast<int>(threadIdx.x); i < num_draw_tiles(); i += kRowThreads) {
          const float tile_max = draw_tile(i).max;
          if (tile_max > -INFINITY) lowest = fminf(lowest, tile_max);
        }
        bins_per_unit = fminf(kBins / (max - block_min(lowest)), 3e38f);
      }
      selected = select(by_mass, target, fraction);
    }
    const float least_depth =
        options.min_p > 0 ? logf(static_cast<float>(options.min_p)) : -INFINITY;
    return {selected.cut, max, inverse_temperature, least_depth};
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

template <class T>
__global__ void __launch_bounds__(kRowThreads, kFilteredResident)
    sample_filtered_kernel(const __grid_constant__ LogitsView<T> logits,
                           const __grid_constant__ RowSplit split,
                           const __grid_constant__ SampleKey key,
                           const __grid_constant__ FilteredDraw draw,
                           const __grid_constant__ SampleResults results) {
  const TileRange range = block_tiles(split);
  const DrawOptions options = draw.of_row(range.row);
  const bool valid = options.valid();
  const bool greedy = options.greedy();
  const double temperature = valid && !greedy ? options.temperature : 1.0;
  DrawTile* const tiles = draw.tiles + range.row * split.tiles * kDrawTiles<T>;
  const uint32_t* allowed =
      draw.allowed == nullptr ? nullptr : draw.allowed + range.row * draw.allowed_stride;
  FilteredRow<T> row{logits.row(range.row),
                     logits.suppress,
                     reinterpret_cast<const uint8_t*>(allowed),
                     tiles,
                     split.tiles,
                     static_cast<float>(kLog2EDouble / temperature),
                     static_cast<float>(1.0 / temperature),
                     -INFINITY,
                     0.0f,
                     0.0f};

  if (valid) {
    for (int t = range.begin + warp_id(); t < range.end; t += kRowWarps) {
      Tile<T> tile;
      row.load(tile, t, kFullMask);
      const DrawTile mine = reduce_draw_tile(tile, row.scale);
      if (counts<T>()) tiles[t * kDrawTiles<T> + own_draw_tile<T>()] = mine;
    }
  }
  if (!last_of_row(split, range.row)) return;
  const bool writes = threadIdx.x == 0;
  if (!valid) {
    if (writes) results.store_undefined(range.row, 0);
    return;
  }

  // The row's maximum and mass, in an order that depends on the vocabulary alone
  const int first_tile = static_cast<int>(threadIdx.x);
  float max = -INFINITY;
  bool broken = false;
  for (int i = first_tile; i < row.num_draw_tiles(); i += kRowThreads) {
    const DrawTile tile = row.draw_tile(i);
    max = fmaxf(max, tile.max);
    broken |= tile.sum != tile.sum;
  }
  row.max = block_max(max);
  if (block_min(broken ? 0 : 1) == 0) {
    int id = row.first_id(0, row.row.vocab, [](float x) { return x != x; });
    if (id == kNoId) id = row.first_id(0, row.row.vocab, [](float x) { return x == INFINITY; });
    if (writes) results.store_undefined(range.row, id);
    return;
  }
  if (row.max == -INFINITY) {
    if (writes) results.store_undefined(range.row, 0);
    return;
  }
  float total = 0.0f;
  int first_best = kNoId;
  for (int i = first_tile; i < row.num_draw_tiles(); i += kRowThreads) {
    const DrawTile tile = row.draw_tile(i);
    if (tile.max > -INFINITY)
      total = fmaf(tile.sum, exp2_approx((tile.max - row.max) * row.scale), total);
    if (tile.max == row.max) first_best = min(first_best, i);
  }
  row.total = block_sum(total);
  const float top1 = 1.0f / row.total;
  if (greedy) {
    const int begin = block_min(first_best) * kDrawTile;
    const int id = row.first_id(begin, begin + kDrawTile, [&](float x) { return x == row.max; });
    if (writes) results.store(range.row, id, top1, top1, top1);
    return;
  }

  // The best draw tile of what is kept, and its mass in all
  const NoiseStream noise = key.noise(range.row);
  Scored best{-INFINITY, kNoId};
  float kept_total = row.total;
  Kept kept{0, row.max, row.inverse_temperature, -INFINITY};
  if (options.filters(row.row.vocab)) {
    kept = row.keep(options);
    float mass = 0.0f;
    row.for_tiles([&](float tile_max) { return kept.in_tile(tile_max); }, [] { return false; },
                  [&](Tile<T>& tile, int t) {
                    row.for_vectors(tile, [&](uint4& raw, int v) {
                      row.hide(raw, [&](int e, float x) { return !kept(tile.id(v, e), x); });
                    });
                    const DrawTile mine = reduce_draw_tile(tile, row.scale);
                    if (!(mine.max > -INFINITY)) return;
                    if (counts<T>())
                      mass = fmaf(mine.sum, exp2_approx((mine.max - row.max) * row.scale), mass);
                    const int index = t * kDrawTiles<T> + own_draw_tile<T>();
                    best.offer(tile_score(log_mass(mine, row.inverse_temperature), index, noise,
                                          key.first_id),
                               index);
                  });
    kept_total = block_sum(mass);
  } else {
    for (int i = first_tile; i < row.num_draw_tiles(); i += kRowThreads) {
      const DrawTile tile = row.draw_tile(i);
      if (tile.max > -INFINITY)
        best.offer(tile_score(log_mass(tile, row.inverse_temperature), i, noise, key.first_id), i);
    }
  }
  const float score = block_max(best.score);
  const int winner = block_min(best.score == score ? best.place : kNoId);
  if (warp_id() != 0) return;
  const Drawn drawn =
      draw_in_tile(row.row, winner, noise, key.first_id, row.inverse_temperature,
                   [&](int id, float x) { return row.is_visible(id) && kept(id, x); });
  if (lane_id() != 0) return;
  const float weight = exp2_approx((drawn.logit - row.max) * row.scale);
  results.store(range.row, drawn.id, weight / kept_total, top1, fminf(top1, weight));
}

// ---- Host side ----

// The kernel above wherever a row may need more than sample_rows_kernel does
inline bool needs_filtered_kernel(const DrawOptions& options, int64_t vocab, bool has_row_options,
                                  bool has_allowed) {
  return has_row_options || has_allowed || (!options.greedy() && options.filters(vocab));
}

// FilteredDraw::tiles takes the partial_bytes, always in global memory
template <class T>
RowLaunch choose_filtered_launch(const RowWork& work, const Device& device) {
  RowLaunch launch = choose_row_launch<T, SamplePartial>(work, device);
  launch.shape.shared_bytes = 0;
  launch.partial_bytes =
      static_cast<size_t>(work.rows) * launch.split.tiles * kDrawTiles<T> * sizeof(DrawTile);
  return launch;
}

}  // namespace dmax::cuda
