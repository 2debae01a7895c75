// Constants shared by the code of every backend, on the host and on the device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DMAX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DMAX_HOST_DEVICE inline
#endif

namespace dmax {

// exp(x) is 2^(x * log2(e))
constexpr double kLog2EDouble = 1.4426950408889634;
constexpr float kLog2E = static_cast<float>(kLog2EDouble);

// Ids that a draw takes or leaves together: it first draws one of these tiles, then one of its ids.
// The shards of 157,184 and of 126,464 ids among 8 ranks begin at multiples of 64.
constexpr int kDrawTile = 64;

// Where the tiles' random numbers begin among the counters; below are those of the ids
constexpr uint32_t kTileCounters = uint32_t{1} << 31;

// The largest k of topk_confidence, and the most tokens that a position's embedding mixes
constexpr int kMaxTopK = 8;

// The largest top_n of token_logprobs, as in vLLM and in OpenAI's API
constexpr int kMaxTopLogprobs = 20;

}  // namespace dmax
