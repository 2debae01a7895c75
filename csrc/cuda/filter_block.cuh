// What a block shares while it searches a row for the last token that filters keep: bins with
// counts and masses, a list of tokens, and reductions over the block.
#pragma once

#include "cuda/top_list.cuh"

namespace dmax::cuda {

constexpr int kBins = 1024;
constexpr int kListed = 2048;

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
  return lane_id() == 0 && atomicAdd(&filtered_shared().listed, 0u) > kListed;
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
