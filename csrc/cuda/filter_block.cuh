// The blocks that search a row for the last token that filters keep, and what each of them has in
// shared memory: bins with counts and masses, a list of tokens, and places for exchanges.
//
// A team is one block, or from sm_90 on a cluster of blocks that write into each other's shared
// memory. Every exchange ends in a barrier of the whole team, and nothing is read of another block
// after its last one: a block may end whenever it likes.
#pragma once

#include <type_traits>

#include "cuda/top_list.cuh"

namespace dmax::cuda {

constexpr int kBins = 1024;
constexpr int kListed = 2048;

struct Sums {
  uint64_t count, mass;
};

// Where a running count or mass reaches its target: at entry `place`, of `count` tokens
struct Found {
  int place;
  unsigned count;
  uint64_t count_before, mass_before, mass_through;
  double target;
};

struct FilteredShared {
  unsigned count[kBins], mass_low[kBins], mass_high[kBins];
  Rank list[kListed];
  unsigned listed;
  uint64_t of_warps[kRowWarps];
  Sums of_blocks[2][kMostClusterBlocks];  // exchanges take turns: blocks may still read the last one
  Found found;
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

__device__ __forceinline__ int block_min(int mine) {
  return block_reduce(mine, [](int a, int b) { return min(a, b); });
}

template <bool kCluster>
class Team {
 public:
  // Blocks of a cluster wait for each other to have begun before they first exchange anything
  __device__ __forceinline__ void begin() {
    if constexpr (kCluster) start_.wait();
    __syncthreads();
  }

  __device__ __forceinline__ int rank() const {
    return kCluster ? static_cast<int>(cluster_rank()) : 0;
  }

  __device__ __forceinline__ void sync() const {
    if constexpr (kCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  // The shared memory of another of the team's blocks
  __device__ __forceinline__ FilteredShared& shared_of(int block) const {
    FilteredShared* shared = &filtered_shared();
    if constexpr (kCluster) shared = in_cluster_rank(shared, static_cast<unsigned>(block));
    return *shared;
  }

  // As block_reduce(); the blocks' values are combined in order
  template <class Value, class Combine>
  __device__ __forceinline__ Value reduce(Value mine, const Combine& combine) {
    const Value of_block = block_reduce(mine, combine);
    if constexpr (!kCluster) return of_block;
    Sums bits{0, 0};
    memcpy(&bits.count, &of_block, sizeof(Value));
    const Sums* const blocks = exchange(bits);
    Value all;
    memcpy(&all, &blocks[0].count, sizeof(Value));
    for (int i = 1; i < size; ++i) {
      Value other;
      memcpy(&other, &blocks[i].count, sizeof(Value));
      all = combine(all, other);
    }
    return all;
  }
  __device__ __forceinline__ float max(float mine) {
    return reduce(mine, [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ __forceinline__ float min(float mine) {
    return reduce(mine, [](float a, float b) { return fminf(a, b); });
  }
  __device__ __forceinline__ int min(int mine) {
    return reduce(mine, [](int a, int b) { return a < b ? a : b; });
  }
  __device__ __forceinline__ uint64_t max(uint64_t mine) {
    return reduce(mine, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }
  template <class Value>
  __device__ __forceinline__ Value sum(Value mine) {
    return reduce(mine, [](Value a, Value b) { return a + b; });
  }

  // The sums of all blocks, in order, from those that thread 0 of each gives
  __device__ __forceinline__ const Sums* exchange(const Sums& mine) {
    const int turn = turn_;
    turn_ ^= 1;
    if (threadIdx.x == 0) {
      for (int i = 0; i < size; ++i) shared_of(i).of_blocks[turn][rank()] = mine;
    }
    sync();
    return filtered_shared().of_blocks[turn];
  }

  int size;

 private:
  int turn_ = 0;
  struct Nothing {};
  std::conditional_t<kCluster, ClusterStart, Nothing> start_;

 public:
  __device__ __forceinline__ explicit Team(int blocks) : size(kCluster ? blocks : 1) {}
};

// ---- Bins ----

__device__ __forceinline__ void clear_bins() {
  FilteredShared& shared = filtered_shared();
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kRowThreads)
    shared.count[i] = shared.mass_low[i] = shared.mass_high[i] = 0;
  __syncthreads();
}
__device__ __forceinline__ void add(int bin, uint64_t mass) {
  FilteredShared& shared = filtered_shared();
  atomicAdd(&shared.count[bin], 1u);
  const auto low = static_cast<unsigned>(mass);
  const unsigned sum = atomicAdd(&shared.mass_low[bin], low) + low;
  const unsigned high = static_cast<unsigned>(mass >> 32) + (sum < low ? 1u : 0u);
  if (high != 0) atomicAdd(&shared.mass_high[bin], high);
}

// Every block of the team has the whole team's counts and masses of its share of the bins
template <bool kCluster>
__device__ __forceinline__ void share_bins(const Team<kCluster>& team) {
  team.sync();
  if constexpr (kCluster) {
    FilteredShared& shared = filtered_shared();
    const int each = kBins / team.size;
    const int first = team.rank() * each;
    for (int i = first + static_cast<int>(threadIdx.x); i < first + each; i += kRowThreads) {
      unsigned count = 0;
      uint64_t mass = 0;
      for (int block = 0; block < team.size; ++block) {
        const FilteredShared& other = team.shared_of(block);
        count += other.count[i];
        mass += static_cast<uint64_t>(other.mass_high[i]) << 32 | other.mass_low[i];
      }
      // No other block reads this share
      shared.count[i] = count;
      shared.mass_low[i] = static_cast<unsigned>(mass);
      shared.mass_high[i] = static_cast<unsigned>(mass >> 32);
    }
    __syncthreads();
  }
}

// ---- The list ----

__device__ __forceinline__ void clear_list() {
  if (threadIdx.x == 0) filtered_shared().listed = 0;
  __syncthreads();
}
// Whole warps call it; lists `rank` on the lanes that say so
__device__ __forceinline__ void put_on_list(Rank rank, bool lists) {
  const uint32_t lanes = __ballot_sync(kFullMask, lists);
  if (lanes == 0) return;
  FilteredShared& shared = filtered_shared();
  unsigned first = 0;
  if (lane_id() == 0) first = atomicAdd(&shared.listed, static_cast<unsigned>(__popc(lanes)));
  first = __shfl_sync(kFullMask, first, 0);
  const unsigned place = first + __popc(lanes & ((1u << lane_id()) - 1u));
  if (lists && place < kListed) shared.list[place] = rank;
}
__device__ __forceinline__ bool list_is_full() {
  unsigned listed = 0;
  if (lane_id() == 0) listed = atomicAdd(&filtered_shared().listed, 0u);
  return __shfl_sync(kFullMask, listed, 0) > kListed;
}

// Brings the blocks' lists together in block 0, whose list they fit or not: how many there are
template <bool kCluster>
__device__ __forceinline__ uint64_t gather_lists(Team<kCluster>* team) {
  FilteredShared& shared = filtered_shared();
  __syncthreads();
  const uint64_t mine = shared.listed;
  if constexpr (!kCluster) return mine;
  const Sums* const blocks = team->exchange({mine, 0});
  uint64_t before = 0;
  uint64_t all = 0;
  for (int i = 0; i < team->size; ++i) {
    if (i < team->rank()) before += blocks[i].count;
    all += blocks[i].count;
  }
  if (all > kListed) return all;
  if (team->rank() > 0) {
    Rank* const list = team->shared_of(0).list + before;
    for (auto i = static_cast<unsigned>(threadIdx.x); i < mine; i += kRowThreads)
      list[i] = shared.list[i];
  }
  team->sync();
  if (threadIdx.x == 0) shared.listed = team->rank() == 0 ? static_cast<unsigned>(all) : 0u;
  __syncthreads();
  return all;
}

// Best first: a bitonic sort, padded with rank 0, which no element has
__device__ __forceinline__ void sort_list() {
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

}  // namespace dmax::cuda
