// Constants shared by the code of every backend, on the host and on the device.
#pragma once

#if defined(__CUDACC__)
#define DMAX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DMAX_HOST_DEVICE inline
#endif

namespace dmax {

// exp(x) is 2^(x * log2(e))
constexpr double kLog2EDouble = 1.4426950408889634;
constexpr float kLog2E = static_cast<float>(kLog2EDouble);

// The largest k of topk_confidence, and the most tokens that a position's embedding mixes
constexpr int kMaxTopK = 8;

}  // namespace dmax
