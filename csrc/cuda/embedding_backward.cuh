// Gradient of hybrid_embedding, without atomics: every sum runs in an order fixed by the input.
//
// With g the incoming gradient, s the unscaled mix, u = s / |s|, t the mix of the norms:
//   ds = (t / |s|) (g - u (u.g)),  dt = u.g
//   d e_k = p_k (ds + dt e_k / |e_k|),  d e_mask = r (ds + dt e_mask / |e_mask|)
//   d p_k = ds.(e_k - [r > 0] e_mask) + dt (|e_k| - [r > 0] |e_mask|)
// Three parts: (1) for every position the scalars of these lines and d p; (2) for every token the
// sum over the entries that name it, which lie side by side once the ids are sorted stably; (3) the
// mask's row, to which every position adds: sums over slices of positions, then their sum in order.
#pragma once

#include "cuda/embedding.cuh"

namespace dmax::cuda {

// ds = g * of_grad - s * of_mix; the mask's row takes ds * of_ds + e(mask) * of_mask
struct PositionGrad {
  float residual;
  float of_grad, of_mix;
  float of_ds, of_mask;
};

struct HybridBackwardArgs {
  HybridArgs forward;
  const void* grad_output;  // [positions, dim]
  float* grad_confidence;   // [positions, k]
  void* grad_embedding;     // [vocab, dim], zero

  // Scratch
  PositionGrad* positions;      // [positions]
  float* of_token;              // [positions, k]: the factor of e(y_k) itself in its own row
  int64_t* ids;                 // [positions, k], written by (1): y_k, or vocab to be left out
  const int64_t* sorted_ids;    // [positions * k]
  const int64_t* sorted_order;  // [positions * k]: the entry each sorted id came from
  float* mask_sums;             // [slices, dim]
};

constexpr int kSlicePositions = 64;
constexpr int kHybridWarps = 4;  // of a block, each with work of its own

__device__ __forceinline__ float inverse(float norm) { return norm == 0.0f ? 0.0f : 1.0f / norm; }

// ---- (1) one warp per position ----

template <class E, int kW, int kTokens>
__device__ __forceinline__ void position_backward(const HybridBackwardArgs& args,
                                                  int64_t position) {
  const EmbeddingTable& table = args.forward.table;
  const int k = args.forward.k;
  const Mix mix = load_mix(args.forward, position);
  const int64_t entry = position * k + lane_id();
  const bool masked = args.forward.masked[position];
  const bool outside = lane_id() < k && !in_table(table, mix.token);
  const bool broken = __ballot_sync(kFullMask, outside) != 0;
  if (masked || broken) {  // masked: d e(mask) = g; broken: a token lies outside the table
    const float none = masked ? 0.0f : NAN;
    if (lane_id() < k) {
      args.grad_confidence[entry] = none;
      args.of_token[entry] = 0.0f;
      args.ids[entry] = table.vocab;
    }
    if (lane_id() == 0)
      args.positions[position] = {0.0f, masked ? 1.0f : 0.0f, 0.0f, masked ? 1.0f : 0.0f, 0.0f};
    return;
  }

  // Dot products of g and s with the embeddings
  float unused[1][kW];
  const MixNorms norms = mix_norms<E, kW, kTokens>(table, mix, WarpTeam{}, unused);
  const E* grad = static_cast<const E*>(args.grad_output) + position * table.dim;
  const E* data = static_cast<const E*>(table.data);
  float grad_token[kTokens], mix_token[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) grad_token[j] = mix_token[j] = 0.0f;
  float grad_mask = 0.0f;
  float mix_mask = 0.0f;
  const int steps = (table.dim + kWarpSize * kW - 1) / (kWarpSize * kW);
  for (int i = 0; i < steps; ++i) {
    const int d = (i * kWarpSize + lane_id()) * kW;
    const bool inside = d < table.dim;  // all lanes stay for the shuffles
    const int at = inside ? d : 0;
    const float counts = inside ? 1.0f : 0.0f;
    float sum[kW], g[kW], values[kW];
    float squares[kTokens] = {};
    float mask_square = 0.0f;
    mix_at<E, kW, kTokens>(table, mix, norms.residual, at, sum, squares, &mask_square);
    load_elements<E, kW>(grad + at, g);
    load_elements<E, kW>(data + table.mask_token_id * table.row_stride + at, values);
#pragma unroll
    for (int e = 0; e < kW; ++e) {
      grad_mask = fmaf(counts * g[e], values[e], grad_mask);
      mix_mask = fmaf(counts * sum[e], values[e], mix_mask);
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (j >= k) break;
      const int64_t token = kTokens == 1 ? mix.token : __shfl_sync(kFullMask, mix.token, j);
      load_elements<E, kW>(data + token * table.row_stride + at, values);
#pragma unroll
      for (int e = 0; e < kW; ++e) {
        grad_token[j] = fmaf(counts * g[e], values[e], grad_token[j]);
        mix_token[j] = fmaf(counts * sum[e], values[e], mix_token[j]);
      }
    }
  }
  grad_mask = warp_sum(grad_mask);
  mix_mask = warp_sum(mix_mask);

  // u.g, and d p of every token
  const float inverse_norm = inverse(norms.norm);
  float grad_mix = norms.residual * grad_mask;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (j >= k) break;
    grad_token[j] = warp_sum(grad_token[j]);
    mix_token[j] = warp_sum(mix_token[j]);
    const float p = kTokens == 1 ? mix.probability : __shfl_sync(kFullMask, mix.probability, j);
    grad_mix = fmaf(p, grad_token[j], grad_mix);
  }
  const float dt = grad_mix * inverse_norm;
  const float of_grad = norms.target * inverse_norm;
  const float of_mix = of_grad * dt * inverse_norm;
  const float open = norms.residual > 0.0f ? 1.0f : 0.0f;
  const float ds_mask = of_grad * grad_mask - of_mix * mix_mask;
  float mine = 0.0f;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (lane_id() == j) mine = of_grad * grad_token[j] - of_mix * mix_token[j];
  }

  // What (2) and (3) need
  const float of_token = lane_id() < k ? mix.probability * dt * inverse(norms.token_norm) : 0.0f;
  const bool is_mask = lane_id() < k && mix.token == table.mask_token_id;
  const float mask_p = warp_sum(is_mask ? mix.probability : 0.0f);
  const float mask_of_token = warp_sum(is_mask ? of_token : 0.0f);
  if (lane_id() < k) {
    args.grad_confidence[entry] =
        mine - open * ds_mask + dt * (norms.token_norm - open * norms.mask_norm);
    args.of_token[entry] = of_token;
    args.ids[entry] = is_mask ? table.vocab : mix.token;  // (3) writes the mask's row
  }
  if (lane_id() == 0)
    args.positions[position] = {norms.residual, of_grad, of_mix, norms.residual + mask_p,
                                norms.residual * dt * inverse(norms.mask_norm) + mask_of_token};
}

template <class E, int kTokens>
__global__ void __launch_bounds__(kHybridWarps* kWarpSize, 4)
    hybrid_backward_positions_kernel(const __grid_constant__ HybridBackwardArgs args) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kHybridWarps + warp_id();
  if (position >= args.forward.positions) return;
  if (args.forward.table.vectors) {
    position_backward<E, kWidth<E>, kTokens>(args, position);
  } else {
    position_backward<E, 1, kTokens>(args, position);
  }
}

// ds of a position at `d`; all lanes
template <class E, int kW, int kTokens>
__device__ __forceinline__ void position_ds(const HybridBackwardArgs& args, int64_t position,
                                            const PositionGrad& scale, int d, float (&ds)[kW]) {
  const EmbeddingTable& table = args.forward.table;
  float sum[kW];
  float g[kW];
  float squares[kTokens] = {};
  float mask_square = 0.0f;
  load_elements<E, kW>(static_cast<const E*>(args.grad_output) + position * table.dim + d, g);
#pragma unroll
  for (int e = 0; e < kW; ++e) ds[e] = scale.of_grad * g[e];
  if (scale.of_mix == 0.0f) return;  // masked, or g is orthogonal to s: no tokens are read
  const Mix mix = load_mix(args.forward, position);
  mix_at<E, kW, kTokens>(table, mix, scale.residual, d, sum, squares, &mask_square);
#pragma unroll
  for (int e = 0; e < kW; ++e) ds[e] = fmaf(-scale.of_mix, sum[e], ds[e]);
}

// ---- (2) one warp per named token and 32 vectors of its row ----

template <class E, int kW, int kTokens>
__device__ __forceinline__ void token_backward(const HybridBackwardArgs& args, int64_t slot,
                                               int chunk) {
  const EmbeddingTable& table = args.forward.table;
  const int64_t entries = args.forward.positions * args.forward.k;
  const int64_t token = args.sorted_ids[slot];
  if (token >= table.vocab) return;                            // no contribution
  if (slot > 0 && args.sorted_ids[slot - 1] == token) return;  // the first entry's warp sums
  const int d = (chunk * kWarpSize + lane_id()) * kW;
  const bool inside = d < table.dim;
  const int at = inside ? d : 0;
  float values[kW];
  load_elements<E, kW>(static_cast<const E*>(table.data) + token * table.row_stride + at, values);
  float total[kW];
#pragma unroll
  for (int e = 0; e < kW; ++e) total[e] = 0.0f;
  for (int64_t s = slot; s < entries && args.sorted_ids[s] == token; ++s) {
    const int64_t entry = args.sorted_order[s];
    const int64_t position = entry / args.forward.k;
    float ds[kW];
    position_ds<E, kW, kTokens>(args, position, args.positions[position], at, ds);
    const float p = args.forward.confidence[entry];
    const float of_token = args.of_token[entry];
#pragma unroll
    for (int e = 0; e < kW; ++e) total[e] += fmaf(p, ds[e], of_token * values[e]);
  }
  if (inside)
    store_elements<E, kW>(static_cast<E*>(args.grad_embedding) + token * table.dim + d, total);
}

template <class E, int kTokens>
__global__ void __launch_bounds__(kHybridWarps* kWarpSize, 4)
    hybrid_backward_tokens_kernel(const __grid_constant__ HybridBackwardArgs args, int chunks) {
  const int64_t work = static_cast<int64_t>(blockIdx.x) * kHybridWarps + warp_id();
  const int64_t slot = work / chunks;
  if (slot >= args.forward.positions * args.forward.k) return;
  const auto chunk = static_cast<int>(work % chunks);
  if (args.forward.table.vectors) {
    token_backward<E, kWidth<E>, kTokens>(args, slot, chunk);
  } else {
    token_backward<E, 1, kTokens>(args, slot, chunk);
  }
}

// ---- (3) the mask's row: sums over slices of positions, then their sum ----

template <class E, int kW, int kTokens>
__device__ __forceinline__ void mask_slice(const HybridBackwardArgs& args, int64_t slice,
                                           int chunk) {
  const EmbeddingTable& table = args.forward.table;
  const int d = (chunk * kWarpSize + lane_id()) * kW;
  const bool inside = d < table.dim;
  const int at = inside ? d : 0;
  float values[kW];
  load_elements<E, kW>(
      static_cast<const E*>(table.data) + table.mask_token_id * table.row_stride + at, values);
  float total[kW];
#pragma unroll
  for (int e = 0; e < kW; ++e) total[e] = 0.0f;
  const int64_t begin = slice * kSlicePositions;
  for (int64_t i = begin; i < begin + kSlicePositions && i < args.forward.positions; ++i) {
    const PositionGrad scale = args.positions[i];
    if (scale.of_ds == 0.0f && scale.of_mask == 0.0f) continue;
    float ds[kW];
    position_ds<E, kW, kTokens>(args, i, scale, at, ds);
#pragma unroll
    for (int e = 0; e < kW; ++e) total[e] += fmaf(scale.of_ds, ds[e], scale.of_mask * values[e]);
  }
  if (!inside) return;
#pragma unroll
  for (int e = 0; e < kW; ++e) args.mask_sums[slice * table.dim + d + e] = total[e];
}

template <class E, int kTokens>
__global__ void __launch_bounds__(kHybridWarps* kWarpSize, 4)
    hybrid_backward_mask_slices_kernel(const __grid_constant__ HybridBackwardArgs args, int chunks,
                                       int64_t slices) {
  const int64_t work = static_cast<int64_t>(blockIdx.x) * kHybridWarps + warp_id();
  const int64_t slice = work / chunks;
  if (slice >= slices) return;
  const auto chunk = static_cast<int>(work % chunks);
  if (args.forward.table.vectors) {
    mask_slice<E, kWidth<E>, kTokens>(args, slice, chunk);
  } else {
    mask_slice<E, 1, kTokens>(args, slice, chunk);
  }
}

template <class E>
__global__ void __launch_bounds__(kHybridWarps* kWarpSize, 4)
    hybrid_backward_mask_row_kernel(const __grid_constant__ HybridBackwardArgs args,
                                    int64_t slices) {
  const EmbeddingTable& table = args.forward.table;
  const int d = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (d >= table.dim) return;
  float total = 0.0f;
  for (int64_t slice = 0; slice < slices; ++slice) total += args.mask_sums[slice * table.dim + d];
  from_float(total, static_cast<E*>(args.grad_embedding) +
                        static_cast<int64_t>(table.mask_token_id) * table.dim + d);
}

// ---- Host side ----

inline int64_t mask_slices(int64_t positions) {
  return (positions + kSlicePositions - 1) / kSlicePositions;
}

// Number of chunks of 32 vectors (or elements) in an embedding row
template <class E>
int row_chunks(const EmbeddingTable& table) {
  const int elements = kWarpSize * (table.vectors ? kWidth<E> : 1);
  return (table.dim + elements - 1) / elements;
}

// (1), after which the caller sorts args.ids
template <class E>
auto launch_hybrid_backward_positions(const HybridBackwardArgs& args, Stream stream) {
  const LaunchShape shape = warps_shape(args.forward.positions, kHybridWarps);
  if (args.forward.k == 1)
    return launch(shape, stream, hybrid_backward_positions_kernel<E, 1>, args);
  return launch(shape, stream, hybrid_backward_positions_kernel<E, kMaxTopK>, args);
}

// (2)
template <class E>
auto launch_hybrid_backward_tokens(const HybridBackwardArgs& args, Stream stream) {
  const int chunks = row_chunks<E>(args.forward.table);
  const LaunchShape shape =
      warps_shape(args.forward.positions * args.forward.k * chunks, kHybridWarps);
  if (args.forward.k == 1)
    return launch(shape, stream, hybrid_backward_tokens_kernel<E, 1>, args, chunks);
  return launch(shape, stream, hybrid_backward_tokens_kernel<E, kMaxTopK>, args, chunks);
}

// (3), first half
template <class E>
auto launch_hybrid_backward_mask_slices(const HybridBackwardArgs& args, Stream stream) {
  const int chunks = row_chunks<E>(args.forward.table);
  const int64_t slices = mask_slices(args.forward.positions);
  const LaunchShape shape = warps_shape(slices * chunks, kHybridWarps);
  if (args.forward.k == 1)
    return launch(shape, stream, hybrid_backward_mask_slices_kernel<E, 1>, args, chunks, slices);
  return launch(shape, stream, hybrid_backward_mask_slices_kernel<E, kMaxTopK>, args, chunks,
                slices);
}

// (3), second half
template <class E>
auto launch_hybrid_backward_mask_row(const HybridBackwardArgs& args, Stream stream) {
  const LaunchShape shape =
      warps_shape((args.forward.table.dim + kWarpSize - 1) / kWarpSize, kHybridWarps);
  return launch(shape, stream, hybrid_backward_mask_row_kernel<E>, args,
                mask_slices(args.forward.positions));
}

}  // namespace dmax::cuda
