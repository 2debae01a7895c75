// A team's row of which it finds where a running count, or mass, reaches a target: the bin, or the
// entry of the sorted list.
#pragma once

#include "cuda/team_row.cuh"

namespace dmax::cuda {

template <class T, bool kCluster>
struct ReachRow : TeamRow<T, kCluster> {
  using Base = TeamRow<T, kCluster>;
  using Base::mass_of;
  using Base::max;
  using Base::team;

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
  // if all do not, and then count_before is that of all. `outside` is this block's, the same on all
  // of its threads.
  __device__ __forceinline__ Found reach_in_bins(Reach search, uint64_t outside) {
    const FilteredShared& shared = filtered_shared();
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
#pragma unroll 1
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
};

}  // namespace dmax::cuda
