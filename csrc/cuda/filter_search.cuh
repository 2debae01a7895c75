// The cut of a row: the last token that top_k, top_p and min_p keep.
//
// The search counts tokens and adds up masses in fixed point, so no order of additions shows in
// the result. First it lists all tokens above the bound that the draw tiles' maxima give, which
// suffices if the list holds them. If not, a histogram finds the bin that the cut is in, and that
// bin is listed.
#pragma once

#include "common/draw_options.h"
#include "cuda/team_row.cuh"

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
struct FilteredRow : TeamRow<T, kCluster> {
  using Base = TeamRow<T, kCluster>;
  using Base::for_draw_tiles;
  using Base::for_units;
  using Base::id_of;
  using Base::inverse_temperature;
  using Base::lowest;
  using Base::mass_of;
  using Base::mass_unit;
  using Base::max;
  using Base::row;
  using Base::scale;
  using Base::team;
  using Base::total;

  // Bins of equal width in the order of the logits, from max on; the last one has no end
  float bins_per_unit;

  // Rises as x falls, whatever the rounding
  __device__ __forceinline__ int bin_of(float x) const {
    return static_cast<int>(fminf((max - x) * bins_per_unit, static_cast<float>(kBins - 1)));
  }

  struct Reach {
    bool by_mass;
    double target;    // a count or a mass; set here if
    double fraction;  // is below 1: that part of the mass of all entries and of what is outside
    uint64_t count_before, mass_before;

    __device__ __forceinline__ void set_target(const Sums& all) {
      if (fraction < 1) target = fraction * static_cast<double>(all.mass + all.outside);
    }
    __device__ __forceinline__ bool reached(const Sums& sums, const Sums& before) const {
      const uint64_t sum = by_mass ? sums.mass + before.mass + mass_before
                                   : sums.count + before.count + count_before;
      return static_cast<double>(sum) >= target;
    }
  };

  // One warp's entries first, ..., first + n - 1, cut into equal parts for the lanes
  struct Lane {
    int begin, end;
    Sums own;      // of this lane's
    Sums through;  // and of those below it
  };
  template <class Entry>
  __device__ __forceinline__ Lane scan(int first, int n, const Entry& entry) const {
    const int each = (n + kWarpSize - 1) / kWarpSize;
    Lane lane{first + min(lane_id() * each, n), first + min((lane_id() + 1) * each, n), {}, {}};
#pragma unroll 1
    for (int i = lane.begin; i < lane.end; ++i) {
      const Sums sums = entry(i);
      lane.own.count += sums.count;
      lane.own.mass += sums.mass;
    }
    lane.through = lane.own;
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const uint64_t count_below = __shfl_up_sync(kFullMask, lane.through.count, lanes);
      const uint64_t mass_below = __shfl_up_sync(kFullMask, lane.through.mass, lanes);
      if (lane_id() >= lanes) {
        lane.through.count += count_below;
        lane.through.mass += mass_below;
      }
    }
    return lane;
  }
  // Tells the team the first of the warp's entries that reaches the target, if one does; cut(i) is
  // the token of entry i
  template <class Entry, class Cut>
  __device__ __forceinline__ void tell_first(const Reach& search, const Lane& lane,
                                             const Sums& before, const Entry& entry,
                                             const Cut& cut) const {
    const uint32_t lanes = __ballot_sync(kFullMask, search.reached(lane.through, before));
    if (lanes == 0 || lane_id() != __ffs(lanes) - 1) return;
    Sums running{lane.through.count - lane.own.count, lane.through.mass - lane.own.mass, 0};
    Found found{};
    found.target = search.target;
#pragma unroll 1
    for (int i = lane.begin; i < lane.end; ++i) {
      found.count_before = running.count + before.count + search.count_before;
      found.mass_before = running.mass + before.mass + search.mass_before;
      const Sums sums = entry(i);
      running.count += sums.count;
      running.mass += sums.mass;
      found.place = i;
      found.count = static_cast<unsigned>(sums.count);
      found.mass_through = running.mass + before.mass + search.mass_before;
      if (search.reached(running, before)) break;
    }
    found.cut = cut(found.place);
    team.tell(found);
  }

  // The first of the team's bins with which the running count, or mass, reaches the target; kBins
  // if all do not, and then count_before is that of all. `outside` is this block's.
  __device__ __forceinline__ Found reach_in_bins(Reach search, uint64_t outside) {
    const FilteredShared& shared = filtered_shared();
    outside = block_reduce(outside, [](uint64_t a, uint64_t b) { return a + b; });
    share_bins(team);
    const auto entry = [&](int i) {
      return Sums{shared.count[i],
                  static_cast<uint64_t>(shared.mass_high[i]) << 32 | shared.mass_low[i], 0};
    };
    const int each = kBins / team.size;
    Lane lane{};
    if (warp_id() == 0) lane = scan(team.rank() * each, each, entry);
    const Exchanged* const blocks =
        team.exchange(Sums{__shfl_sync(kFullMask, lane.through.count, kWarpSize - 1),
                           __shfl_sync(kFullMask, lane.through.mass, kWarpSize - 1), outside});
    Sums before{0, 0, 0};
    Sums all{0, 0, 0};
    for (int i = 0; i < team.size; ++i) {
      const Sums of_block = from_words<Sums>(blocks[i]);
      if (i == team.rank()) before = all;
      all.count += of_block.count;
      all.mass += of_block.mass;
      all.outside += of_block.outside;
    }
    search.set_target(all);
    const bool in_an_earlier_block = team.rank() > 0 && search.reached({0, 0, 0}, before);
    if (warp_id() == 0 && !in_an_earlier_block)
      tell_first(search, lane, before, entry, [](int) { return Rank{0}; });
    Found found = team.told();
    if (!search.reached(all, {0, 0, 0})) {
      found = Found{};
      found.place = kBins;
      found.count_before = all.count + search.count_before;
    }
    return found;
  }
  // The same in the list that gather_lists() has brought together; a place past its end if none
  // does
  __device__ __forceinline__ Found reach_in_list(const Reach& search, const Sums& gathered) {
    if (team.rank() == 0) sort_list();
    return reach_in_sorted(search, gathered);
  }
  // Once more, in the list as it is
  __device__ __forceinline__ Found reach_again(const Reach& search, const Sums& gathered) {
    team.sync();  // all have read what was told last
    return reach_in_sorted(search, gathered);
  }
  __device__ __forceinline__ Found reach_in_sorted(Reach search, const Sums& gathered) {
    const FilteredShared& shared = filtered_shared();
    if (team.rank() == 0 && warp_id() == 0) {
      const auto entry = [&](int i) { return Sums{1, mass_of(value_of(shared.list[i])), 0}; };
      const Lane lane = scan(0, static_cast<int>(shared.listed), entry);
      const Sums all{gathered.count, __shfl_sync(kFullMask, lane.through.mass, kWarpSize - 1),
                     gathered.outside};
      search.set_target(all);
      if (lane_id() == 0 && !search.reached(all, {0, 0, 0})) {
        Found none{};
        none.place = kListed + 1;
        team.tell(none);
      }
      tell_first(search, lane, {0, 0, 0}, entry, [&](int i) { return shared.list[i]; });
    }
    return team.told();
  }

  // ---- The search for the cut ----

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
