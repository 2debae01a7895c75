// hybrid_embedding: the mix of token and mask embeddings at every position. One warp per position.
#pragma once

#include "cuda/embedding.cuh"

namespace dmax::cuda {

struct HybridArgs {
  EmbeddingTable table;
  const void* token;        // [positions, k], int64 or int32
  const float* confidence;  // [positions, k]
  const bool* masked;       // [positions]
  int64_t positions;
  int k;
  bool wide_tokens;  // int64
};

__device__ __forceinline__ Mix load_mix(const HybridArgs& args, int64_t position) {
  Mix mix{0, 0.0f, args.k};
  if (lane_id() >= (args.k == 1 ? kWarpSize : args.k)) return mix;
  const int64_t place = position * args.k + (args.k == 1 ? 0 : lane_id());
  mix.token = args.wide_tokens ? static_cast<const int64_t*>(args.token)[place]
                               : static_cast<const int32_t*>(args.token)[place];
  mix.probability = args.confidence[place];
  return mix;
}

constexpr int kHybridWarps = 4;

template <class E, int kTokens>
__global__ void __launch_bounds__(kHybridWarps* kWarpSize, 4)
    hybrid_embedding_kernel(const __grid_constant__ HybridArgs args, void* out) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * warps + warp_id();
  if (position >= args.positions) return;
  const Mix mix = load_mix(args, position);
  const Embedding kind = args.masked[position] ? Embedding::kMask : Embedding::kHybrid;
  write_embedding<E, kTokens>(args.table, kind, mix, out, position);
}

// One warp per block while that leaves multiprocessors idle: chosen by arithmetic, not yet measured
inline LaunchShape choose_hybrid_launch(int64_t positions, const Device& device) {
  const int warps = positions <= 4 * device.multiprocessors ? 1 : kHybridWarps;
  return {static_cast<unsigned>((positions + warps - 1) / warps),
          static_cast<unsigned>(warps * kWarpSize), 0};
}

template <class E>
auto launch_hybrid_embedding(const HybridArgs& args, void* out, const Device& device,
                             Stream stream) {
  const LaunchShape shape = choose_hybrid_launch(args.positions, device);
  if (args.k == 1) return launch(shape, stream, hybrid_embedding_kernel<E, 1>, args, out);
  return launch(shape, stream, hybrid_embedding_kernel<E, kMaxTokens>, args, out);
}

}  // namespace dmax::cuda
