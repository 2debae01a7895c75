// The part of CUDA C++ that cuda/*.cuh uses, for the host compiler; the CUDA toolkit is not needed.
// Compile with -fno-extern-tls-init, or `extern __shared__` calls a null wrapper.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "simt/executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
// One OS thread hosts one block, so its copy of a thread_local is the block's
#define __shared__ thread_local

#define threadIdx (::simt::self().thread)
#define blockIdx (::simt::self().block)
#define blockDim (::simt::self().block_dim)
#define gridDim (::simt::self().grid_dim)

using std::max;
using std::min;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- Barriers ----

inline void __syncthreads(SIMT_SITE) {
  simt::block_barrier(simt::BarrierKind::kSync, 0, {file, line});
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return simt::block_barrier(simt::BarrierKind::kOr, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
  return simt::block_barrier(simt::BarrierKind::kAnd, predicate, {file, line});
}
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return simt::block_barrier(simt::BarrierKind::kCount, predicate, {file, line});
}
inline void __syncwarp(uint32_t mask = 0xffffffff, SIMT_SITE) {
  simt::warp_collective(simt::WarpOp::kSync, mask, 0, 0, {file, line});
}

// ---- Warp shuffles, votes and reductions ----

namespace simt {

template <class T>
T shuffle(WarpOp op, uint32_t mask, T value, int argument, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "CUDA shuffles carry up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(op, mask, bits, argument, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, SIMT_SITE) {
  return simt::shuffle(simt::WarpOp::kShuffle, mask, value, lane, {file, line});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, SIMT_SITE) {
  return simt::shuffle(simt::WarpOp::kShuffleXor, mask, value, lanes, {file, line});
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned lanes, SIMT_SITE) {
  return simt::shuffle(simt::WarpOp::kShuffleUp, mask, value, static_cast<int>(lanes),
                       {file, line});
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned lanes, SIMT_SITE) {
  return simt::shuffle(simt::WarpOp::kShuffleDown, mask, value, static_cast<int>(lanes),
                       {file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return static_cast<uint32_t>(
      simt::warp_collective(simt::WarpOp::kBallot, mask, predicate != 0, 0, {file, line}));
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value, SIMT_SITE) {
  return static_cast<uint32_t>(
      simt::warp_collective(simt::WarpOp::kReduceMax, mask, value, 0, {file, line}));
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value, SIMT_SITE) {
  return static_cast<uint32_t>(
      simt::warp_collective(simt::WarpOp::kReduceMin, mask, value, 0, {file, line}));
}

// ---- Atomics: relaxed, as on the device ----

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, old >= limit ? 0 : old + 1, false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  simt::after_atomic(address);
  return old;
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  simt::after_atomic(address);
  return old;
}
inline void __threadfence() { simt::fence(); }

// ---- Bits and arithmetic ----

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }

#undef SIMT_SITE

namespace simt {

// Defined with the kernels, which declare its type and name
void* dynamic_shared_base();

template <class... Parameters, class... Arguments>
void launch(const Grid& grid, void (*kernel)(Parameters...), const Arguments&... arguments) {
  run(grid, [&] { kernel(arguments...); }, dynamic_shared_base);
}

}  // namespace simt
