// The cut of a row: the last token that top_k, top_p and min_p keep.
//
// The search counts tokens and adds up masses in fixed point, so no order of additions shows in
// the result. A team of blocks (filter_block.cuh) has the row: each of a cluster's blocks holds its
// tiles in shared memory, a single block reads them again. First the search lists all tokens above the bound that the draw tiles' maxima give, which
// suffices if the list holds them. If not, a histogram finds the bin that the cut is in, and that
// bin is listed.
#pragma once

#include "common/draw_options.h"
#include "cuda/visible_row.cuh"

namespace dmax::cuda {

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

template <class T, bool kCluster>
struct FilteredRow : VisibleRow<T> {
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
  float total;  // sum of exp((x - max) / temperature)

  // Bins of equal width in the order of the logits, from max on; the last one has no end
  float bins_per_unit;

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
    if constexpr (kCluster)
      return held[(unit - first_tile * kVectors) * kWarpSize + lane_id()];
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

  // ---- Masses and bins ----

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

  struct Reach {
    bool by_mass;
    double target;    // a count or a mass; set here if
    double fraction;  // is below 1: that part of the mass of all entries and of `outside`
    uint64_t outside;
    uint64_t count_before, mass_before;
  };

  // The first of the team's entries with which the running count, or mass, reaches the target;
  // `none` if they all do not. This block has entries first, ..., first + n - 1, after those of the
  // blocks before it; entry(i) has entry i's Sums. All threads call it, warp 0 works.
  template <class Entry>
  __device__ __forceinline__ Found reach(Reach search, int first, int n, int none,
                                         const Entry& entry) {
    FilteredShared& shared = filtered_shared();
    const int each = (n + kWarpSize - 1) / kWarpSize;
    const int begin = first + min(lane_id() * each, n);
    const int end = first + min((lane_id() + 1) * each, n);
    Sums own{0, 0};      // of this lane
    Sums through{0, 0};  // and of those below it
    if (warp_id() == 0) {
      for (int i = begin; i < end; ++i) {
        const Sums sums = entry(i);
        own.count += sums.count;
        own.mass += sums.mass;
      }
      through = own;
#pragma unroll
      for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
        const uint64_t count_below = __shfl_up_sync(kFullMask, through.count, lanes);
        const uint64_t mass_below = __shfl_up_sync(kFullMask, through.mass, lanes);
        if (lane_id() >= lanes) {
          through.count += count_below;
          through.mass += mass_below;
        }
      }
    }
    // Thread 0 has to give the block's sums
    const Sums of_block{__shfl_sync(kFullMask, through.count, kWarpSize - 1),
                        __shfl_sync(kFullMask, through.mass, kWarpSize - 1)};
    const Sums* const blocks = team.exchange(of_block);
    Sums before{0, 0};
    Sums all{0, 0};
    for (int i = 0; i < team.size; ++i) {
      if (i == team.rank()) before = all;
      all.count += blocks[i].count;
      all.mass += blocks[i].mass;
    }
    if (search.fraction < 1)
      search.target = search.fraction * static_cast<double>(all.mass + search.outside);
    const auto reached = [&](const Sums& sums) {
      const uint64_t sum = search.by_mass ? sums.mass + before.mass + search.mass_before
                                          : sums.count + before.count + search.count_before;
      return static_cast<double>(sum) >= search.target;
    };
    if (warp_id() == 0) {
      const uint32_t lanes = __ballot_sync(kFullMask, reached(through));
      const bool in_an_earlier_block = reached({0, 0}) && team.rank() > 0;
      if (lanes != 0 && !in_an_earlier_block && lane_id() == __ffs(lanes) - 1) {
        Sums running{through.count - own.count, through.mass - own.mass};
        Found found{none, 0, 0, 0, 0, search.target};
        for (int i = begin; i < end; ++i) {
          found.count_before = running.count + before.count + search.count_before;
          found.mass_before = running.mass + before.mass + search.mass_before;
          const Sums sums = entry(i);
          running.count += sums.count;
          running.mass += sums.mass;
          found.place = i;
          found.count = static_cast<unsigned>(sums.count);
          found.mass_through = running.mass + before.mass + search.mass_before;
          if (reached(running)) break;
        }
        for (int i = 0; i < team.size; ++i) team.shared_of(i).found = found;
      }
    }
    const uint64_t reached_sum = search.by_mass ? all.mass + search.mass_before
                                                : all.count + search.count_before;
    const bool none_does = !(static_cast<double>(reached_sum) >= search.target);
    team.sync();
    if (none_does) return {none, 0, 0, 0, 0, search.target};
    return shared.found;
  }
  __device__ __forceinline__ Found reach_in_bins(const Reach& search) {
    const FilteredShared& shared = filtered_shared();
    share_bins(team);
    const int each = kBins / team.size;
    return reach(search, team.rank() * each, each, kBins, [&](int i) {
      return Sums{shared.count[i],
                  static_cast<uint64_t>(shared.mass_high[i]) << 32 | shared.mass_low[i]};
    });
  }
  // In the sorted list of block 0
  __device__ __forceinline__ Found reach_in_list(const Reach& search) {
    const FilteredShared& shared = filtered_shared();
    const int listed = static_cast<int>(shared.listed);
    return reach(search, 0, listed, kListed + 1,
                 [&](int i) { return Sums{1, mass_of(value_of(shared.list[i]))}; });
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
  __device__ __forceinline__ Selected select(bool by_mass, double target, double fraction) {
    FilteredShared& shared = filtered_shared();

    // The maxima alone reach the target in this bin at the latest
    clear_bins();
    for_draw_tiles([&](int, const DrawTile& tile) { add(bin_of(tile.max), mass_of(tile.max)); });
    const double approximately = 1.00001 * static_cast<double>(total) * mass_unit();
    const Found bound = reach_in_bins(
        {by_mass, fraction < 1 ? fraction * approximately : target, 1.0, 0, 0, 0});
    int deepest = min(bound.place, kBins - 1);

    uint64_t outside = 0;  // the mass of the draw tiles that stay below
    unsigned wanted = 0;   // how many do not: each has a token above the bound
    for_draw_tiles([&](int, const DrawTile& tile) {
      if (bin_of(tile.max) > deepest) {
        outside +=
            static_cast<uint64_t>(tile.sum * exp2_approx((tile.max - max) * scale) * mass_unit());
      } else {
        ++wanted;
      }
    });
    outside = team.sum(outside);

    uint64_t count_before = 0;
    uint64_t mass_before = 0;
    Rank first = ~Rank{0};
    Rank last = 0;
    int shift = 0;
    Pass pass = team.sum(wanted) <= kListed ? Pass::kListAll : Pass::kBins;
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
      for_units([&](float tile_max) { return bin_of(tile_max) <= deepest; },
                [&] { return lists && list_is_full(); },
                [&](const uint4& raw, int unit) {
#pragma unroll
                  for (int e = 0; e < kWidth<T>; ++e) {
                    const float x = element<T>(raw, e);
                    const bool visible = x > -INFINITY;
                    const int bin = visible ? bin_of(x) : kBins;
                    if (pass == Pass::kBins) {
                      if (visible) add(bin, mass_of(x));
                      continue;
                    }
                    if (pass == Pass::kListAll && visible && bin > deepest) unlisted += mass_of(x);
                    const Rank rank = rank_of(x, id_of(unit, e));
                    const bool in_bin = pass == Pass::kListAll ? bin <= deepest : bin == deepest;
                    const bool chosen = in_bin && rank <= first && rank >= last;
                    if (lists) {
                      put_on_list(rank, chosen);
                    } else if (chosen && pass == Pass::kNarrow) {
                      add(static_cast<int>((first - rank) >> shift), mass_of(x));
                    } else if (chosen) {
                      highest = rank > highest ? rank : highest;
                      lowest = rank < lowest ? rank : lowest;
                    }
                  }
                });

      if (lists && gather_lists(&team) <= kListed) {
        outside += team.sum(unlisted);
        if (team.rank() == 0) sort_list();
        const Found found = reach_in_list(
            {by_mass, target, fraction, outside, count_before, mass_before});
        if (found.place > kListed) return {0, 0};
        const Rank cut = team.shared_of(0).list[found.place];
        team.sync();  // before the list changes
        return {cut, found.mass_through};
      }
      if (lists) {
        pass = Pass::kBins;
        continue;
      }
      if (pass == Pass::kBounds) {
        first = team.max(highest);
        last = ~team.max(~lowest);
      } else {
        const Found found = reach_in_bins(
            {by_mass, target, fraction, outside, count_before, mass_before});
        const int bin = found.place;
        if (bin == kBins) return {0, 0};
        target = found.target;
        fraction = 1.0;
        count_before = found.count_before;
        mass_before = found.mass_before;
        if (pass == Pass::kBins) {
          deepest = bin;
        } else {
          first -= static_cast<Rank>(bin) << shift;
          const Rank width = (Rank{1} << shift) - 1;
          last = first - last > width ? first - width : last;
        }
        if (found.count <= kListed) {
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
        for_draw_tiles([&](int, const DrawTile& tile) { lowest = fminf(lowest, tile.max); });
        bins_per_unit = fminf(kBins / (max - team.min(lowest)), 3e38f);
      }
      selected = select(by_mass, target, fraction);
    }
    const float least_depth =
        options.min_p > 0 ? logf(static_cast<float>(options.min_p)) : -INFINITY;
    return {selected.cut, max, inverse_temperature, least_depth};
  }
};

}  // namespace dmax::cuda
