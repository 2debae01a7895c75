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
constexpr int kReadTogether = 4;  // blocks whose bins a thread reads in one go: registers limit it

struct Sums {
  uint64_t count, mass;
  uint64_t outside;  // mass of elements that are not among those counted
};

// The entry at which a running count or mass reaches its target
struct Found {
  int place;       // a bin, or a place of the sorted list
  unsigned count;  // of the tokens in that bin
  Rank cut;        // the token at that place
  uint64_t count_before, mass_before, mass_through;
  double target;
};

struct alignas(16) Exchanged {
  uint32_t words[8];
};

struct FilteredShared {
  union {  // every pass over the row fills one of the two
    struct {
      unsigned count[kBins], mass_low[kBins], mass_high[kBins];
    };
    Rank list[kListed];
  };
  unsigned listed;
  Exchanged of_warps[kRowWarps];
  // Of all blocks. Exchanges take turns: a block may still read the last one
  Exchanged of_blocks[2][kMostClusterBlocks];
  Found found;
};

__device__ __forceinline__ FilteredShared& filtered_shared() {
  __shared__ FilteredShared shared;
  return shared;
}

template <class Value>
__device__ __forceinline__ Exchanged as_words(const Value& value) {
  static_assert(sizeof(Value) <= sizeof(Exchanged) && sizeof(Value) % 4 == 0, "whole words");
  Exchanged words{};
  memcpy(&words, &value, sizeof(Value));
  return words;
}
template <class Value>
__device__ __forceinline__ Value from_words(const Exchanged& words) {
  Value value;
  memcpy(&value, &words, sizeof(Value));
  return value;
}

// The lanes' values by steps of `lanes`, `lanes` / 2, ..., 1. Not unrolled, here and wherever a
// loop runs once a row: the kernel's code is read through the instruction cache once a row too.
template <class Value, class Combine>
__device__ __forceinline__ Value reduce_lanes(Value mine, int lanes, const Combine& combine) {
#pragma unroll 1
  for (; lanes > 0; lanes /= 2) {
    Exchanged other = as_words(mine);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Value) / 4); ++i)
      other.words[i] = __shfl_xor_sync(kFullMask, other.words[i], lanes);
    mine = combine(mine, from_words<Value>(other));
  }
  return mine;
}

// combine() is associative and commutative; the result is the same on every thread
template <class Value, class Combine>
__device__ __forceinline__ Value block_reduce(Value mine, const Combine& combine) {
  FilteredShared& shared = filtered_shared();
  mine = reduce_lanes(mine, kWarpSize / 2, combine);
  if (lane_id() == 0) shared.of_warps[warp_id()] = as_words(mine);
  __syncthreads();
  mine = from_words<Value>(shared.of_warps[lane_id() % kRowWarps]);
  __syncthreads();
  return reduce_lanes(mine, kRowWarps / 2, combine);
}

__device__ __forceinline__ int block_min(int mine) {
  return block_reduce(mine, [](int a, int b) { return min(a, b); });
}

template <bool kCluster>
class Team {
 public:
  int size;

  __device__ __forceinline__ explicit Team(int blocks) : size(kCluster ? blocks : 1) {}

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

  // The shared memory of one of the team's blocks
  __device__ __forceinline__ FilteredShared& shared_of(int block) const {
    FilteredShared* shared = &filtered_shared();
    if constexpr (kCluster) shared = in_cluster_rank(shared, static_cast<unsigned>(block));
    return *shared;
  }

  // What each block's first warp gives, on all of its lanes: every block gets all, in order
  template <class Value>
  __device__ __forceinline__ const Exchanged* exchange(const Value& mine) {
    const int turn = turn_;
    turn_ ^= 1;
    const auto block = static_cast<int>(threadIdx.x);
    if (block < size) shared_of(block).of_blocks[turn][rank()] = as_words(mine);
    sync();
    return filtered_shared().of_blocks[turn];
  }

  // As block_reduce(); the blocks' values are combined in order
  template <class Value, class Combine>
  __device__ __forceinline__ Value reduce(const Value& mine, const Combine& combine) {
    const Value of_block = block_reduce(mine, combine);
    if constexpr (!kCluster) return of_block;
    const Exchanged* const blocks = exchange(of_block);
    Value all = from_words<Value>(blocks[0]);
#pragma unroll 1
    for (int i = 1; i < size; ++i) all = combine(all, from_words<Value>(blocks[i]));
    return all;
  }

  template <class Value>
  __device__ __forceinline__ Value sum(const Value& mine) {
    return reduce(mine, [](const Value& a, const Value& b) { return a + b; });
  }

  // Leaves `found` with every block, by one thread of the team; then all wait for it
  __device__ __forceinline__ void tell(const Found& found) const {
    for (int i = 0; i < size; ++i) shared_of(i).found = found;
  }
  __device__ __forceinline__ Found told() const {
    sync();
    return filtered_shared().found;
  }

 private:
  int turn_ = 0;
  struct Nothing {};
  std::conditional_t<kCluster, ClusterStart, Nothing> start_;
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
#pragma unroll 1
      for (int begin = 0; begin < team.size; begin += kReadTogether) {
        unsigned counts[kReadTogether], low[kReadTogether], high[kReadTogether];
#pragma unroll
        for (int j = 0; j < kReadTogether; ++j) {  // all loads before the first use
          const bool there = begin + j < team.size;
          const FilteredShared& other = team.shared_of(there ? begin + j : begin);
          counts[j] = there ? other.count[i] : 0u;
          low[j] = there ? other.mass_low[i] : 0u;
          high[j] = there ? other.mass_high[i] : 0u;
        }
#pragma unroll
        for (int j = 0; j < kReadTogether; ++j) {
          count += counts[j];
          mass += static_cast<uint64_t>(high[j]) << 32 | low[j];
        }
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
__device__ __forceinline__ void put_on_list(Rank rank) {
  FilteredShared& shared = filtered_shared();
  const unsigned place = atomicAdd(&shared.listed, 1u);
  if (place < kListed) shared.list[place] = rank;
}
__device__ __forceinline__ bool list_is_full() {
  unsigned listed = 0;
  if (lane_id() == 0) listed = atomicAdd(&filtered_shared().listed, 0u);
  return __shfl_sync(kFullMask, listed, 0) > kListed;
}

// Brings the blocks' lists together in block 0, if they fit into its list. Returns how many there
// are, and sums up `outside`, which is the same on every thread of a block
template <bool kCluster>
__device__ __forceinline__ Sums gather_lists(Team<kCluster>* team, uint64_t outside) {
  FilteredShared& shared = filtered_shared();
  const uint64_t mine = shared.listed;
  if constexpr (!kCluster) return {mine, 0, outside};
  const Exchanged* const blocks = team->exchange(Sums{mine, 0, outside});
  uint64_t before = 0;
  Sums all{0, 0, 0};
#pragma unroll 1
  for (int i = 0; i < team->size; ++i) {
    const Sums of_block = from_words<Sums>(blocks[i]);
    if (i == team->rank()) before = all.count;
    all.count += of_block.count;
    all.outside += of_block.outside;
  }
  if (all.count > kListed) return all;
  if (team->rank() > 0) {
    Rank* const list = team->shared_of(0).list + before;
    for (auto i = static_cast<unsigned>(threadIdx.x); i < mine; i += kRowThreads)
      list[i] = shared.list[i];
  }
  team->sync();
  if (threadIdx.x == 0) shared.listed = static_cast<unsigned>(all.count);
  return all;
}

// Best first: if every thread has one entry, to the place that the entries above it leave; else by
// a bitonic sort, padded with rank 0, which no element has
__device__ __forceinline__ void sort_list() {
  FilteredShared& shared = filtered_shared();
  __syncthreads();
  const auto n = static_cast<int>(shared.listed);
  const int thread = static_cast<int>(threadIdx.x);
  if (n <= kRowThreads) {
    const Rank mine = thread < n ? shared.list[thread] : 0;
    int above = 0;
#pragma unroll 4
    for (int i = 0; i < n; ++i) above += shared.list[i] > mine ? 1 : 0;
    __syncthreads();
    if (thread < n) shared.list[above] = mine;
    __syncthreads();
    return;
  }
  int size = 2;
  while (size < n) size *= 2;
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
