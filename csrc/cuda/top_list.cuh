// The k best elements of a row, held by a warp: lane j has the j-th best. topk_confidence and
// spd_step_ list them while they scan a row's tiles.
#pragma once

#include "cuda/rows.cuh"

namespace dmax::cuda {

// A number that orders elements as the ops do: NaN first, then the larger value, then the lower id.
// No two elements of a row have the same rank, and none has rank 0.
using Rank = uint64_t;

__device__ __forceinline__ Rank rank_of(float value, int id) {
  const float canonical = value + 0.0f;  // -0 and +0 are equal
  const uint32_t bits = __float_as_uint(canonical);
  const uint32_t ordered = (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  const uint32_t key = value != value ? 0xfffffffeu : ordered;  // above +inf
  return static_cast<Rank>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ __forceinline__ int id_of(Rank rank) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(rank));
}
// Not for the rank of a NaN
__device__ __forceinline__ float value_of(Rank rank) {
  const auto key = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float((key & 0x80000000u) ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ Rank warp_max_rank(Rank rank) {
  const auto high = static_cast<uint32_t>(rank >> 32);
  const uint32_t best = __reduce_max_sync(kFullMask, high);
  const uint32_t low = high == best ? static_cast<uint32_t>(rank) : 0u;
  return static_cast<Rank>(best) << 32 | __reduce_max_sync(kFullMask, low);
}

// One compare-exchange of a bitonic sort: with the lane `step` away, whichever is asked for stays
__device__ __forceinline__ Rank kept_of_pair(Rank rank, int step, bool larger) {
  const Rank other = __shfl_xor_sync(kFullMask, rank, step);
  return (rank > other) == larger ? rank : other;
}
// A lane's rank each: in lane 0 the best, in lane 31 the worst
__device__ __forceinline__ Rank sorted(Rank rank) {
#pragma unroll
  for (int run = 2; run <= kWarpSize; run *= 2) {
#pragma unroll
    for (int step = run / 2; step > 0; step /= 2)
      rank = kept_of_pair(rank, step, ((lane_id() & step) == 0) == ((lane_id() & run) == 0));
  }
  return rank;
}

struct TopList {
  Rank mine;   // this lane's entry, 0 if there is none
  Rank worst;  // the k-th entry, on every lane
  int k;

  __device__ __forceinline__ explicit TopList(int k_) : mine(0), worst(0), k(k_) {}

  // `rank` is the same on every lane and better than worst
  __device__ __forceinline__ void insert(Rank rank) {
    const int place = __popc(__ballot_sync(kFullMask, mine > rank));
    const Rank previous = __shfl_up_sync(kFullMask, mine, 1);
    if (lane_id() > place) mine = previous;
    if (lane_id() == place) mine = rank;
    keep_k();
  }

  // Takes a list whose entries the lanes hold in order
  __device__ __forceinline__ void merge(Rank other) {
    const Rank reversed = __shfl_xor_sync(kFullMask, other, kWarpSize - 1);
    if (reversed > mine) mine = reversed;  // the best 32 of both, first falling, then rising
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2)
      mine = kept_of_pair(mine, step, (lane_id() & step) == 0);
    keep_k();
  }

  // Takes one candidate per lane; whether any belonged in the list
  __device__ __forceinline__ bool offer(Rank candidate) {
    const int count = __popc(__ballot_sync(kFullMask, candidate > worst));
    if (count > kInserted) {
      merge(sorted(candidate));
      return true;
    }
    for (int i = 0; i < count; ++i) {
      const Rank best = warp_max_rank(candidate);
      if (best <= worst) break;  // an earlier candidate has raised it
      insert(best);
      if (candidate == best) candidate = 0;
    }
    return count > 0;
  }

 private:
  // Sorting and merging takes 20 exchanges; an insertion has about a fifth of their instructions.
  // Neither was timed.
  static constexpr int kInserted = 4;

  __device__ __forceinline__ void keep_k() {
    if (lane_id() >= k) mine = 0;
    worst = __shfl_sync(kFullMask, mine, k - 1);
  }
};

// This lane's best element of the tile that ranks below `bound`
template <class T>
__device__ __forceinline__ Rank best_below(Tile<T>& tile, int vocab, Rank bound) {
  Rank best = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    forget(tile.raw[v]);  // 64 ranks kept from one call to the next would not fit into registers
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) {
      const int id = tile.id(v, e);
      const Rank rank = rank_of(tile.at(v, e), id);
      if (id < vocab && rank < bound && rank > best) best = rank;
    }
  }
  return best;
}

// Takes the tile's elements into the list: each lane's best, then each lane's second, and so on.
// Most tiles of a long row have none that belongs in it; the best 20 of a first tile are rarely
// more than four of one lane.
template <class T>
__device__ __forceinline__ void list_tile(TopList& list, Tile<T>& tile, const SoftmaxStats& stats,
                                          int vocab) {
  if (rank_of(stats.max, stats.id) <= list.worst) return;
  Rank mine = ~Rank{0};
  do {
    mine = best_below(tile, vocab, mine);
  } while (list.offer(mine));
}

// Lists of a row on their way to its last block, in [rows, splits, k]
__device__ __forceinline__ Rank* lists_of(const RowSplit& split, Rank* lists, int64_t row, int k) {
  return lists + row * split.splits * k;
}

// scan_tiles that also lists the k best elements: every warp leaves its list in shared memory, and
// warp 0 merges them into the block's, in `lists`. k <= kMost; `also` as in scan_tiles().
template <class In, bool kMaySkip = false, int kMost = kMaxTopK, class Also = NothingElse>
__device__ __forceinline__ void scan_tiles_and_list(const LogitsView<In>& logits,
                                                    const RowSplit& split, const TileRange& range,
                                                    Rank* lists, int k, bool skipped = false,
                                                    const Also& also = {}) {
  static_assert(kMost <= kWarpSize, "a lane holds one entry");
  __shared__ Rank of_warps[kRowWarps * kMost];
  using T = ElementOf<In>;
  const Row<T> row = logits.row(range.row);
  const auto hidden = logits.hidden(range.row);
  TopList list(k);
  for (int t = range.begin + warp_id(); t < range.end; t += kRowWarps) {
    Tile<T> tile;
    load_tile(tile, row, t, hidden);
    if (kMaySkip && skipped_after_loads(tile, skipped)) break;
    const SoftmaxStats stats = tile_stats(tile, row, hidden, logits.scale);
    if (lane_id() == 0) *partial_of<Top1Partial>(split, range.row, t) = {stats};
    also(tile, stats, t);
    list_tile(list, tile, stats, logits.vocab);
  }
  if (kMaySkip && skipped) return;
  if (lane_id() < k) of_warps[warp_id() * k + lane_id()] = list.mine;
  __syncthreads();
  if (warp_id() != 0) return;
  for (int warp = 1; warp < kRowWarps; ++warp)
    list.merge(lane_id() < k ? of_warps[warp * k + lane_id()] : 0);
  if (lane_id() < k) lists_of(split, lists, range.row, k)[range.part * k + lane_id()] = list.mine;
}

constexpr int kLoadedLists = 4;

// The row's k best elements, by one warp of its last block
__device__ __forceinline__ TopList merge_lists(const RowSplit& split, const Rank* lists,
                                               int64_t row, int k) {
  TopList list(k);
  const Rank* p = lists + row * split.splits * k + lane_id();
  for (int first = 0; first < split.splits; first += kLoadedLists) {
    Rank loaded[kLoadedLists];
#pragma unroll
    for (int i = 0; i < kLoadedLists; ++i) {  // all loads before the first use
      const bool there = first + i < split.splits && lane_id() < k;
      loaded[i] = there ? load_other_block_8(p + (first + i) * k) : 0;
    }
#pragma unroll
    for (int i = 0; i < kLoadedLists; ++i) {
      if (first + i < split.splits) list.merge(loaded[i]);
    }
  }
  return list;
}

// Probability of a listed element; NaN if the row has no finite normaliser
__device__ __forceinline__ float listed_probability(Rank rank, const SoftmaxStats& stats,
                                                    float scale) {
  const float top = top1_probability(stats);
  return top == top ? exp2_approx((value_of(rank) - stats.max) * scale) * top : NAN;
}

// Bytes of the lists that the blocks of a launch leave
inline size_t list_bytes(const RowLaunch& run, int k) {
  return size_t{run.shape.blocks} * k * sizeof(Rank);
}

}  // namespace dmax::cuda
