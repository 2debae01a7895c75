// Small kernels with one bug each, which the executor must catch. `fixed` selects the same kernel
// without the bug; python_tests/test_simt_executor.py runs both versions.
#pragma once

#include "simt/cuda_on_host.h"

namespace simt::planted {

constexpr int kThreads = 64;

// out[i] = in[n - 1 - i] through shared memory
__global__ void missing_syncthreads(const float* in, float* out, bool fixed) {
  __shared__ float tile[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = in[i];
  if (fixed) __syncthreads();
  out[i] = tile[kThreads - 1 - i];
}

__global__ void static_shared_off_by_one(const float* in, float* out, bool fixed) {
  __shared__ float tile[kThreads];
  const int i = static_cast<int>(threadIdx.x) + (fixed ? 0 : 1);
  tile[i] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void global_out_of_bounds(const float* in, float* out, bool fixed) {
  out[threadIdx.x] = in[threadIdx.x + (fixed ? 0 : 1)];
}

extern __shared__ uint4 planted_dynamic[];

// The launch asks for kThreads floats of dynamic shared memory
__global__ void dynamic_shared_overrun(const float* in, float* out, bool fixed) {
  auto* tile = reinterpret_cast<float*>(planted_dynamic);
  tile[threadIdx.x + (fixed ? 0 : 1)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned_vector(const float* in, float* out, bool fixed) {
  if (threadIdx.x >= kThreads / 4 - 1) return;
  const uint4 raw = *reinterpret_cast<const uint4*>(in + 4 * threadIdx.x + (fixed ? 0 : 1));
  out[threadIdx.x] = __uint_as_float(raw.x);
}

// Every block stores its part, and the last block to arrive sums the parts. `fence`: 0 missing, 1
// in a thread that neither wrote nor counts, 2 right
__global__ void last_block_sums(float* parts, unsigned* counter, float* out, int fence) {
  __shared__ bool last;
  if (threadIdx.x == 0) parts[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
  if (fence == 1 && threadIdx.x == 1) __threadfence();
  if (threadIdx.x == 0) {
    if (fence == 2) __threadfence();
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    if (fence == 2) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
  out[0] = sum;
}

__global__ void divergent_syncthreads(const float* in, float* out, bool fixed) {
  if (fixed || threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void barrier_after_exit(const float* in, float* out, bool fixed) {
  out[threadIdx.x] = in[threadIdx.x];
  if (!fixed && threadIdx.x >= kThreads / 2) return;
  __syncthreads();
}

__global__ void wrong_shuffle_mask(const float* in, float* out, bool fixed) {
  const uint32_t mask = fixed ? 0xffffffffu : 0x0000ffffu;
  out[threadIdx.x] = __shfl_sync(mask, in[threadIdx.x], 31);
}

__global__ void shuffle_from_outside_the_mask(const float* in, float* out, bool fixed) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, in[threadIdx.x], fixed ? 15 : 16);
}

__global__ void lane_missing_from_syncwarp(const float* in, float* out, bool fixed) {
  out[threadIdx.x] = in[threadIdx.x];
  if (fixed || threadIdx.x != 5) __syncwarp();
  __syncthreads();
}

inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cluster_arrive(true);
  cluster_wait({file, line});
}

// out[block] = first thread's value of the next block of the cluster
__global__ void leaves_cluster_early(const float* in, float* out, bool fixed) {
  __shared__ float mine;
  if (threadIdx.x == 0) mine = in[self().cluster_rank];
  cluster_barrier();
  const unsigned next = (self().cluster_rank + 1) % self().cluster_size;
  if (threadIdx.x == 0) out[blockIdx.x] = *static_cast<float*>(map_shared_rank(&mine, next));
  if (fixed) cluster_barrier();
}

// Every block writes into the next one's shared memory, which may not have begun
__global__ void writes_to_a_block_before_it_begins(const float* in, float* out, bool fixed) {
  __shared__ float mine;
  const unsigned next = (self().cluster_rank + 1) % self().cluster_size;
  cluster_arrive(false);
  if (fixed) cluster_wait({__FILE__, __LINE__});
  if (threadIdx.x == 0)
    *static_cast<float*>(map_shared_rank(&mine, next)) = in[self().cluster_rank];
  if (!fixed) cluster_wait({__FILE__, __LINE__});
  cluster_barrier();
  if (threadIdx.x == 0) out[blockIdx.x] = mine;
}

// Every block writes a value into the next one's shared memory, which reads it after the barrier.
// With `release`, the arrival hands the value over
__global__ void pushes_without_release(const float* in, float* out, bool release) {
  __shared__ float mine;
  const unsigned next = (self().cluster_rank + 1) % self().cluster_size;
  cluster_arrive(false);
  cluster_wait({__FILE__, __LINE__});
  if (threadIdx.x == 0)
    *static_cast<float*>(map_shared_rank(&mine, next)) = in[self().cluster_rank];
  cluster_arrive(release);
  cluster_wait({__FILE__, __LINE__});
  if (threadIdx.x == 0) out[blockIdx.x] = mine;
}

// Every block pushes twice; without a barrier in between, the second value may overwrite the first
// before it is read
__global__ void pushes_again_too_early(const float* in, float* out, bool fixed) {
  __shared__ float mine;
  const unsigned next = (self().cluster_rank + 1) % self().cluster_size;
  float sum = 0;
  cluster_barrier();
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0)
      *static_cast<float*>(map_shared_rank(&mine, next)) = in[self().cluster_rank];
    cluster_barrier();
    if (threadIdx.x == 0) sum += mine;
    if (fixed) cluster_barrier();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Collectives that must work: warp sums by shuffle, votes, reductions, barriers with a value
__global__ void collectives(const float* in, float* out, bool) {
  const unsigned i = threadIdx.x;
  float sum = in[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  const uint32_t odd = __ballot_sync(0xffffffffu, static_cast<int>(i) & 1);
  const float below = __shfl_up_sync(0xffffffffu, in[i], 1);
  const float above = __shfl_down_sync(0xffffffffu, in[i], 1);
  const uint32_t most = __reduce_max_sync(0xffffffffu, i);
  const uint32_t least = __reduce_min_sync(0xffffffffu, i);
  const int count = __syncthreads_count(i % 3 == 0);
  const int some = __syncthreads_or(i == 7);
  const int all = __syncthreads_and(i != 7);
  const bool right = odd == 0xaaaaaaaau && below == (i % 32 == 0 ? in[i] : in[i - 1]) &&
                     above == (i % 32 == 31 ? in[i] : in[i + 1]) && most == (i | 31u) &&
                     least == (i & ~31u) && count == (kThreads + 2) / 3 && some == 1 && all == 0;
  out[i] = right ? sum : -1.0f;
}

}  // namespace simt::planted
