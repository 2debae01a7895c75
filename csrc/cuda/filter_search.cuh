// The cut of a row: the last token that top_k, top_p and min_p keep.
//
// The search counts tokens and adds up masses in fixed point, so no order of additions shows in
// the result. First it lists all tokens above the bound that the draw tiles' maxima give, which
// suffices if the list holds them. If not, a histogram finds the bin that the cut is in, and that
// bin is listed.
#pragma once

#include "common/draw_options.h"
#include "cuda/filter_reach.cuh"

namespace dmax::cuda {

// The tokens that the filters keep, of a row without NaN
struct Kept {
  float least;  // the last of them
  int last_id;
  float max;  // of the row
  float inverse_temperature;
  float least_depth;  // log(min_p); -inf: off

  // A cut of 0 keeps every token
  __device__ __forceinline__ Kept(Rank cut, float max_, float inverse_temperature_,
                                  float least_depth_)
      : least(cut == 0 ? -INFINITY : value_of(cut)),
        last_id(cut == 0 ? kNoId : dmax::cuda::id_of(cut)),
        max(max_),
        inverse_temperature(inverse_temperature_),
        least_depth(least_depth_) {}

  __device__ __forceinline__ bool deep(float x) const {
    return (x - max) * inverse_temperature < least_depth;
  }
  __device__ __forceinline__ bool operator()(int id, float x) const {
    return (x > least || (x == least && id <= last_id)) && !deep(x);
  }
  // Whether a draw tile with this maximum may hold one of them
  __device__ __forceinline__ bool in_tile(float tile_max) const { return (*this)(0, tile_max); }
};

template <class T, bool kCluster>
struct FilteredRow : ReachRow<T, kCluster> {
  using Base = ReachRow<T, kCluster>;
  using Base::bin_of;
  using Base::bins_per_unit;
  using Base::for_draw_tiles;
  using Base::for_units;
  using Base::id_of;
  using Base::inverse_temperature;
  using Base::lowest;
  using Base::mass_of;
  using Base::mass_unit;
  using Base::max;
  using Base::reach_again;
  using Base::reach_in_bins;
  using Base::reach_in_list;
  using Base::row;
  using Base::scale;
  using Base::team;
  using Base::total;
  using typename Base::Reach;

  struct Selected {
    Rank cut;       // 0: every token
    uint64_t mass;  // of the tokens up to the cut
    bool with_next;
  };

  enum class Pass {
    kMaxima,   // bins of the draw tiles' maxima, which bound the cut from below
    kListAll,  // lists every token above the bound
    kBins,     // finds the bin that the cut is in
    kBounds,   // more tokens lie in it than the list holds, such as equal ones: their ranks' range
    kNarrow,   // narrower bins, of ranks
    kListBin,  // lists the tokens of that bin
  };

  // Adds the elements of `taken`, one bit each, to their bins: half a vector at a time, whose
  // additions are all on their way before the first carry is looked at
  __device__ __forceinline__ void add_all(uint4 raw, uint32_t taken) const {
    constexpr int kHalf = kWidth<T> / 2;
    FilteredShared& shared = filtered_shared();
#pragma unroll 1
    for (int half = 0; half < 2; ++half, taken >>= kHalf, raw.x = raw.z, raw.y = raw.w) {
      int bins[kHalf];
      uint64_t masses[kHalf];
      unsigned sums[kHalf];
#pragma unroll
      for (int e = 0; e < kHalf; ++e) {
        const float x = element<T>(raw, e);
        bins[e] = bin_of(x);
        masses[e] = mass_of(x);
        sums[e] = ~0u;
        if ((taken >> e & 1) == 0) continue;
        const auto low = static_cast<unsigned>(masses[e]);
        atomicAdd(&shared.count[bins[e]], 1u);
        sums[e] = atomicAdd(&shared.mass_low[bins[e]], low) + low;
      }
#pragma unroll
      for (int e = 0; e < kHalf; ++e) {
        const bool carries = sums[e] < static_cast<unsigned>(masses[e]);
        const unsigned high = static_cast<unsigned>(masses[e] >> 32) + (carries ? 1u : 0u);
        if ((taken >> e & 1) != 0 && high != 0) atomicAdd(&shared.mass_high[bins[e]], high);
      }
    }
  }

  // The cut at which the count, or the mass in units of mass_unit, first reaches the target. A
  // fraction below 1 sets the target: that part of all the row's mass. With `next` below 1, the cut
  // at that part of the mass up to that cut, where the same list has it: with_next says so.
  __device__ __forceinline__ Selected select(bool by_mass, double target, double fraction,
                                             double next) {
    const auto add_up = [](uint64_t a, uint64_t b) { return a + b; };
    int deepest = kBins - 1;  // the bin of the bound, later of the cut
    uint64_t outside = 0;     // of draw tiles below the bound: this thread's mass
    uint64_t count_before = 0;
    uint64_t mass_before = 0;
    Rank first = ~Rank{0};
    Rank last = 0;
    int shift = 0;
    Pass pass = Pass::kMaxima;
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
      // The bins whose elements this pass takes
      const bool one_bin = pass != Pass::kListAll && pass != Pass::kBins;
      const int least_bin = one_bin ? deepest : 0;
      const int most_bin = pass == Pass::kBins ? kBins - 1 : deepest;
      const auto take = [&](const uint4& raw, int unit) {
        uint32_t visible = 0;
        uint32_t taken = 0;
#pragma unroll
        for (int e = 0; e < kWidth<T>; ++e) {
          const float x = element<T>(raw, e);
          const int bin = bin_of(x);
          if (!(x > -INFINITY)) continue;
          visible |= 1u << e;
          if (bin >= least_bin && bin <= most_bin) taken |= 1u << e;
        }
        if (pass == Pass::kBins) {
          add_all(raw, taken);
          return;
        }
        if (pass == Pass::kListAll && fraction < 1) {
#pragma unroll 1
          for (uint32_t left = visible & ~taken; left != 0; left &= left - 1)
            unlisted += mass_of(element_at<T>(raw, __ffs(left) - 1));
        }
#pragma unroll 1
        for (; taken != 0; taken &= taken - 1) {
          const int e = __ffs(taken) - 1;
          const float x = element_at<T>(raw, e);
          const Rank rank = rank_of(x, id_of(unit, e));
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
      };
      if (pass == Pass::kMaxima) {
        for_draw_tiles(
            [&](int, const DrawTile& tile) { add(bin_of(tile.max), mass_of(tile.max)); });
      } else {
        for_units([&](float tile_max) { return bin_of(tile_max) <= deepest; },
                  [&] { return lists && list_is_full(); }, take);
      }
      __syncthreads();

      Reach search{by_mass, target, fraction, count_before, mass_before};
      if (lists) {
        const uint64_t not_listed =
            fraction < 1 ? block_reduce(outside + unlisted, add_up) : uint64_t{0};
        const Sums gathered = gather_lists(&team, not_listed);
        if (gathered.count <= kListed) {
          Found found = reach_in_list(search, gathered);
          if (found.place > kListed) return {0, 0, false};
          const double next_target = next * static_cast<double>(found.mass_through);
          const bool with_next = next < 1 && next_target > static_cast<double>(mass_before);
          if (with_next) found = reach_again({true, next_target, 1.0, 0, mass_before}, gathered);
          return {found.cut, found.mass_through, with_next};
        }
        pass = Pass::kBins;
        continue;
      }
      if (pass == Pass::kBounds) {
        struct Bounds {
          Rank highest, lowest;
        };
        const Bounds bounds =
            team.reduce(Bounds{highest, lowest}, [](const Bounds& a, const Bounds& b) {
              return Bounds{a.highest > b.highest ? a.highest : b.highest,
                            a.lowest < b.lowest ? a.lowest : b.lowest};
            });
        first = bounds.highest;
        last = bounds.lowest;
      } else {
        if (pass == Pass::kMaxima) {
          // The maxima alone reach the target in this bin at the latest
          const double approximately = 1.00001 * static_cast<double>(total) * mass_unit;
          search = {by_mass, fraction < 1 ? fraction * approximately : target, 1.0, 0, 0};
        }
        const uint64_t not_binned =
            search.fraction < 1 ? block_reduce(outside, add_up) : uint64_t{0};
        const Found found = reach_in_bins(search, not_binned);
        const int bin = found.place;
        if (pass == Pass::kMaxima) {
          deepest = min(bin, kBins - 1);
          if (fraction < 1) {
            for_draw_tiles([&](int, const DrawTile& tile) {
              if (bin_of(tile.max) > deepest) outside += mass_of(tile);
            });
          }
          // So many draw tiles reach above the bound, with at least a token each
          pass = found.count_before + found.count <= kListed ? Pass::kListAll : Pass::kBins;
          continue;
        }
        if (bin == kBins) return {0, 0, false};
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
    Selected selected{0, 0, false};
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
      const bool by_mass = filter == 1;
      double target = options.top_k;
      double fraction = 1.0;
      if (by_mass) {
        if (!(top_p < 1) || selected.with_next) continue;
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
        bins_per_unit = fminf(kBins / (max - lowest), 3e38f);
      }
      selected = select(by_mass, target, fraction, by_mass ? 1.0 : top_p);
    }
    const float least_depth =
        options.min_p > 0 ? logf(static_cast<float>(options.min_p)) : -INFINITY;
    return {selected.cut, max, inverse_temperature, least_depth};
  }
};

}  // namespace dmax::cuda
