// What the kernels need beyond the CUDA language: wrappers of single instructions. Each has a host
// twin, which lets csrc/simt/ run every kernel unchanged on the CPU.
#pragma once

#include <cstdint>

#include "common/element_types.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "simt/cuda_on_host.h"
#endif

namespace dmax::cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// All kernels of the library share this declaration; each views it as the type it needs
extern __shared__ uint4 dynamic_shared[];

// Dynamic shared memory that a kernel gets without asking: 48 KB less 1 KB for its static arrays,
// which count towards the 48 KB
constexpr size_t kDefaultDynamicShared = 47 * 1024;
// From so much shared memory a block on, a multiprocessor gives all it can to that and not to its
// L1: oput_loss_and_grad_ took 2 to 7 % less time on an H100
constexpr size_t kMuchShared = 32 * 1024;

struct LaunchShape {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes;  // dynamic
  unsigned cluster = 1;
  size_t static_bytes = 0;  // of shared memory, where they are more than 1 KB
};

// Blocks of `per_block` warps, enough for `warps` in all
inline LaunchShape warps_shape(int64_t warps, int per_block) {
  return {static_cast<unsigned>((warps + per_block - 1) / per_block),
          static_cast<unsigned>(per_block * kWarpSize), 0};
}

#if defined(__CUDACC__)

using Stream = cudaStream_t;

// The one way a kernel is started
template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchShape& shape, Stream stream, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (shape.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  const auto set = [&](cudaFuncAttribute what, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), what, value);
  };
  cudaError_t error = cudaSuccess;
  const size_t shared = shape.shared_bytes + shape.static_bytes;
  if (shared > kMuchShared)
    error = set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && shared > kDefaultDynamicShared)
    error = set(cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// 2^x, about 2 ulp
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Makes the compiler forget what it has computed from v, if keeping it would cost registers
__device__ __forceinline__ void forget(uint4& v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}

// The same for a float: a load whose result is forgotten here is issued before here, even if it is
// needed only under a condition
__device__ __forceinline__ void forget(float& x) { asm volatile("" : "+f"(x)); }

// Both halves at once; of a NaN and a number they give the number, as fmaxf does
__device__ __forceinline__ uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t max_half2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// For what is read once, and written by nobody while the kernel runs
__device__ __forceinline__ uint4 load_constant(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

// For what another block has just written: bypasses the L1, which other blocks' stores do not reach
template <class T>
__device__ __forceinline__ T load_other_block(const T* p) {
  static_assert(sizeof(T) % 16 == 0, "16-byte loads");
  constexpr int kParts = sizeof(T) / 16;
  uint4 parts[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) parts[i] = __ldcg(reinterpret_cast<const uint4*>(p) + i);
  T value;
  memcpy(&value, parts, sizeof(T));
  return value;
}

__device__ __forceinline__ uint64_t load_other_block_8(const uint64_t* p) {
  return __ldcg(reinterpret_cast<const unsigned long long*>(p));
}
__device__ __forceinline__ float load_other_block_4(const float* p) { return __ldcg(p); }

// atomicInc, ordered for the whole GPU: what the caller wrote, or has seen written across a
// barrier, comes before it, and what it reads afterwards comes after it
__device__ __forceinline__ unsigned increment_acq_rel(unsigned* counter, unsigned limit) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(counter)), "r"(limit)
               : "memory");
  return old;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t float_to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
// Both at once, `low` in the low bits
__device__ __forceinline__ uint32_t floats_to_bfloat16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ uint32_t floats_to_half2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Clusters need sm_90; no launch asks for one on an older GPU
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  __trap();
  return 0;
#endif
}
__device__ __forceinline__ unsigned cluster_index() {
#if __CUDA_ARCH__ >= 900
  unsigned index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
#else
  __trap();
  return 0;
#endif
}
// The two halves of the cluster's barrier. With release, what was written before the one is seen
// after the other; the relaxed form says only that the block has begun.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}
template <class T>
__device__ __forceinline__ T* in_cluster_rank(T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  __trap();
  return shared + rank;
#endif
}

#else  // host twins

struct Stream {};

template <class... Parameters, class... Arguments>
int launch(const LaunchShape& shape, Stream, void (*kernel)(Parameters...),
           const Arguments&... arguments) {
  simt::launch({shape.blocks, shape.threads, shape.shared_bytes, shape.cluster}, kernel,
               arguments...);
  return 0;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline void forget(uint4&) {}
inline void forget(float&) {}
inline uint4 load_constant(const void* p) {
  simt::count_bytes_read(sizeof(uint4));
  return *static_cast<const uint4*>(p);
}
template <class T>
T load_other_block(const T* p) {
  return *p;
}
inline uint64_t load_other_block_8(const uint64_t* p) { return *p; }
inline float load_other_block_4(const float* p) { return *p; }
inline unsigned increment_acq_rel(unsigned* counter, unsigned limit) {
  __threadfence();
  const unsigned old = atomicInc(counter, limit);
  __threadfence();
  return old;
}

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof(bits));
  return static_cast<float>(value);
}
inline uint16_t float_to_half(float x) {
  const auto value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest even
}
inline uint32_t floats_to_bfloat16x2(float low, float high) {
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
}
inline uint32_t floats_to_half2(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}

template <class ToFloat>
uint32_t max_of_halves(uint32_t a, uint32_t b, const ToFloat& to_float) {
  const auto larger = [&](uint16_t x, uint16_t y) {
    const float fx = to_float(x);
    const float fy = to_float(y);
    return fx > fy || fy != fy ? x : y;
  };
  return larger(static_cast<uint16_t>(a), static_cast<uint16_t>(b)) |
         static_cast<uint32_t>(larger(a >> 16, b >> 16)) << 16;
}
inline uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  return max_of_halves(a, b,
                       [](uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); });
}
inline uint32_t max_half2(uint32_t a, uint32_t b) { return max_of_halves(a, b, half_to_float); }

inline unsigned cluster_rank() { return simt::self().cluster_rank; }
inline unsigned cluster_index() { return simt::self().block.x / simt::self().cluster_size; }
inline void cluster_arrive() { simt::cluster_arrive(true); }
inline void cluster_arrive_relaxed() { simt::cluster_arrive(false); }
inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::cluster_wait({file, line});
}
template <class T>
T* in_cluster_rank(T* shared, unsigned rank) {
  return static_cast<T*>(simt::map_shared_rank(shared, rank));
}

#endif

// What a launch's shape depends on
struct Device {
  int multiprocessors;
  int major;                 // of the compute capability
  int max_shared_per_block;  // bytes, with the kernel's consent
  int most_cluster_rows;     // up to this many rows, a row's blocks form a cluster where they can
  int splits;                // blocks per row, to time other choices; 0: as chosen
};

// A thread's side of the barrier that every block of a cluster arrives at when it begins. A block's
// shared memory may be written by others only after they have waited there.
class ClusterStart {
 public:
  __device__ __forceinline__ ClusterStart() { cluster_arrive_relaxed(); }
  // Whole warps call it; only a warp's first call waits
  __device__ __forceinline__ void wait() {
    if (waited_) return;
    cluster_wait();
    waited_ = true;
  }

 private:
  bool waited_ = false;
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// Butterflies: every lane gets the same bits, since a + b and max(a, b) do not depend on order
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, lanes));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullMask, x, lanes);
  return x;
}

}  // namespace dmax::cuda
