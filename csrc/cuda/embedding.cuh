// hybrid_embedding: the mix of mix.cuh at every position.
#pragma once

#include "cuda/mix.cuh"

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

// With several tokens, their rows and squares take 128 registers a thread; with one, 64 do
template <class E, int kTokens>
__global__ void __launch_bounds__(BlockTeam::kThreads, kTokens == 1 ? 4 : 2)
    hybrid_embedding_kernel(const __grid_constant__ HybridArgs args, void* out) {
  const int64_t position = blockIdx.x;
  const bool masked = args.masked[position];
  const Mix mix = load_mix(args, position);  // beside `masked`, whatever that turns out to be
  write_embedding<E, kTokens>(args.table, masked ? Embedding::kMask : Embedding::kHybrid, mix, out,
                              position, BlockTeam{});
}

inline LaunchShape hybrid_shape(int64_t positions) {
  return {static_cast<unsigned>(positions), BlockTeam::kThreads, 0};
}

template <class E>
auto launch_hybrid_embedding(const HybridArgs& args, void* out, Stream stream) {
  const LaunchShape shape = hybrid_shape(args.positions);
  if (args.k == 1) return launch(shape, stream, hybrid_embedding_kernel<E, 1>, args, out);
  return launch(shape, stream, hybrid_embedding_kernel<E, kMaxTopK>, args, out);
}

}  // namespace dmax::cuda
