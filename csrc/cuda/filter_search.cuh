// The cut of a row: the last token that top_k, top_p and min_p keep.
//
// The search counts tokens and adds up masses in fixed point, so no order of additions shows in
// the result. First it lists all tokens above the bound that the draw tiles' maxima give, which
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

template <class T>
struct FilteredRow : VisibleRow<T> {
  using VisibleRow<T>::row;
  using VisibleRow<T>::draw_tile;
  using VisibleRow<T>::num_draw_tiles;
  using VisibleRow<T>::for_tiles;
  using VisibleRow<T>::for_vectors;

  float scale;  // log2(e) / temperature
  float inverse_temperature;
  float max;
  float total;  // sum of exp((x - max) / temperature)

  // Bins of equal width in the order of the logits, from max on; the last one has no end
  float bins_per_unit;

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
};

}  // namespace dmax::cuda
