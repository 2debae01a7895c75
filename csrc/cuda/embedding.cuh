// The mix of token and mask embeddings, eqs. 8-10, for one position by one warp:
// p_1 e(y_1) + ... + p_k e(y_k) + r e(mask) with r = max(1 - sum p, 0), rescaled to the same mix of
// the norms. It is computed in float32 and rounded once, when it is stored.
#pragma once

#include "common/constants.h"
#include "cuda/elements.cuh"

namespace dmax::cuda {

enum class ElementType { kFloat, kBFloat16, kFloat16 };

struct EmbeddingTable {
  const void* data;  // [vocab, dim]
  int64_t row_stride;
  int vocab;
  int dim;
  int mask_token_id;
  ElementType type;
  bool vectors;  // every row of table and output starts at a multiple of 16 bytes
};

// Describes the table; `rows` points to the contiguous [positions, dim] output or gradient, of
// which only the alignment matters
inline EmbeddingTable make_table(const void* data, int64_t row_stride, int64_t vocab, int64_t dim,
                                 int64_t mask_token_id, ElementType type, const void* rows) {
  const int64_t bytes = type == ElementType::kFloat ? 4 : 2;
  const auto unaligned = [](int64_t size) { return size % 16 != 0; };
  const bool vectors = !unaligned(reinterpret_cast<intptr_t>(data)) &&
                       !unaligned(reinterpret_cast<intptr_t>(rows)) &&
                       !unaligned(row_stride * bytes) && !unaligned(dim * bytes);
  return {data,
          row_stride,
          static_cast<int>(vocab),
          static_cast<int>(dim),
          static_cast<int>(mask_token_id),
          type,
          vectors};
}

template <class E, int kW>
__device__ __forceinline__ void load_elements(const E* p, float (&out)[kW]) {
  if (kW == 1) {
    out[0] = to_float(*p);
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
#pragma unroll
    for (int e = 0; e < kW; ++e) out[e] = element<E>(raw, e);
  }
}

template <class E, int kW>
__device__ __forceinline__ void store_elements(E* p, const float (&values)[kW]) {
  if constexpr (kW == 1) {
    from_float(values[0], p);
  } else {
    *reinterpret_cast<uint4*>(p) = pack<E>(values);
  }
}

// A row outside the table is never read; the position becomes NaN
__device__ __forceinline__ bool in_table(const EmbeddingTable& table, int64_t token) {
  return token >= 0 && token < table.vocab;
}

// Lane j < k holds the j-th token and its probability
struct Mix {
  int64_t token;
  float probability;
  int k;
};

template <class E, int kW>
__device__ __forceinline__ void copy_embedding(const EmbeddingTable& table, int64_t token, E* out) {
  const E* row = static_cast<const E*>(table.data) + token * table.row_stride;
  const bool inside = in_table(table, token);
  for (int d = lane_id() * kW; d < table.dim; d += kWarpSize * kW) {
    float values[kW];
    if (inside) {
      load_elements<E, kW>(row + d, values);
    } else {
#pragma unroll
      for (int e = 0; e < kW; ++e) values[e] = NAN;
    }
    store_elements<E, kW>(out + d, values);
  }
}

// The norms that scale the mix, and the residual probability of the mask
struct MixNorms {
  float residual;
  float target;      // the mix of the norms
  float norm;        // of the mix
  float token_norm;  // lane j < k: |e(y_j)|
  float mask_norm;

  __device__ __forceinline__ float scale() const { return norm == 0.0f ? 0.0f : target / norm; }
};

// The unscaled mix at `d`
template <class E, int kW, int kTokens>
__device__ __forceinline__ void mix_at(const EmbeddingTable& table, const Mix& mix, float residual,
                                       int d, float (&sum)[kW], float (&squares)[kTokens],
                                       float* mask_square) {
  const E* data = static_cast<const E*>(table.data);
  float values[kW];
  load_elements<E, kW>(data + table.mask_token_id * table.row_stride + d, values);
#pragma unroll
  for (int e = 0; e < kW; ++e) {
    sum[e] = residual * values[e];
    *mask_square = fmaf(values[e], values[e], *mask_square);
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (j >= mix.k) break;
    const int64_t token = kTokens == 1 ? mix.token : __shfl_sync(kFullMask, mix.token, j);
    const float p = kTokens == 1 ? mix.probability : __shfl_sync(kFullMask, mix.probability, j);
    load_elements<E, kW>(data + token * table.row_stride + d, values);
#pragma unroll
    for (int e = 0; e < kW; ++e) {
      sum[e] = fmaf(p, values[e], sum[e]);
      squares[j] = fmaf(values[e], values[e], squares[j]);
    }
  }
}

template <class E, int kW, int kTokens>
__device__ __forceinline__ MixNorms mix_norms(const EmbeddingTable& table, const Mix& mix) {
  MixNorms norms;
  const float p = lane_id() < mix.k ? mix.probability : 0.0f;
  norms.residual = 1.0f - (kTokens == 1 ? mix.probability : warp_sum(p));
  if (norms.residual < 0.0f) norms.residual = 0.0f;  // a NaN stays NaN
  float squares[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) squares[j] = 0.0f;
  float mask_square = 0.0f;
  float mix_square = 0.0f;
  const int lane_begin = lane_id() * kW;
  const int last = (table.dim - 1) / (kWarpSize * kW);
#pragma unroll(kW == 1 || kTokens > 1 ? 1 : 4)
  for (int i = 0; i <= last; ++i) {
    const int d = lane_begin + i * kWarpSize * kW;
    const bool inside = d < table.dim;  // all lanes stay for the shuffles
    float sum[kW];
    float here[kTokens];
#pragma unroll
    for (int j = 0; j < kTokens; ++j) here[j] = squares[j];
    float mask_here = mask_square;
    mix_at<E, kW, kTokens>(table, mix, norms.residual, inside ? d : 0, sum, here, &mask_here);
    if (inside) {
#pragma unroll
      for (int e = 0; e < kW; ++e) mix_square = fmaf(sum[e], sum[e], mix_square);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) squares[j] = here[j];
      mask_square = mask_here;
    }
  }
  norms.norm = sqrtf(warp_sum(mix_square));
  norms.mask_norm = sqrtf(warp_sum(mask_square));
  norms.token_norm = 0.0f;
  norms.target = norms.residual * norms.mask_norm;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (j >= mix.k) break;
    const float norm = sqrtf(warp_sum(squares[j]));
    const float weight =
        kTokens == 1 ? mix.probability : __shfl_sync(kFullMask, mix.probability, j);
    norms.target = fmaf(weight, norm, norms.target);
    if (lane_id() == j) norms.token_norm = norm;
  }
  return norms;
}

template <class E, int kW, int kTokens>
__device__ __forceinline__ void hybrid_row(const EmbeddingTable& table, const Mix& mix, E* out) {
  const MixNorms norms = mix_norms<E, kW, kTokens>(table, mix);
  const float scale = norms.scale();
  const int last = (table.dim - 1) / (kWarpSize * kW);
#pragma unroll(kW == 1 || kTokens > 1 ? 1 : 2)
  for (int i = 0; i <= last; ++i) {
    const int d = (i * kWarpSize + lane_id()) * kW;
    const bool inside = d < table.dim;
    float sum[kW];
    float squares[kTokens] = {};
    float mask_square = 0.0f;
    mix_at<E, kW, kTokens>(table, mix, norms.residual, inside ? d : 0, sum, squares, &mask_square);
#pragma unroll
    for (int e = 0; e < kW; ++e) sum[e] *= scale;
    if (inside) store_elements<E, kW>(out + d, sum);
  }
}

// What an input position of the next forward pass holds
enum class Embedding { kMask, kHybrid, kToken };

// Writes row `position` of `out` [positions, dim]: e(mask), the mix, or e(the mix's first token)
template <class E, int kTokens>
__device__ __forceinline__ void write_embedding(const EmbeddingTable& table, Embedding kind,
                                                const Mix& mix, void* out, int64_t position) {
  E* row = static_cast<E*>(out) + position * table.dim;
  int64_t hard =
      kind == Embedding::kMask ? table.mask_token_id : __shfl_sync(kFullMask, mix.token, 0);
  if (kind == Embedding::kHybrid) {
    const bool outside = lane_id() < mix.k && !in_table(table, mix.token);
    if (__ballot_sync(kFullMask, outside) == 0) {
      if (table.vectors) return hybrid_row<E, kWidth<E>, kTokens>(table, mix, row);
      return hybrid_row<E, 1, kTokens>(table, mix, row);
    }
    hard = -1;  // a row of NaN
  }
  if (table.vectors) return copy_embedding<E, kWidth<E>>(table, hard, row);
  copy_embedding<E, 1>(table, hard, row);
}

// ---- hybrid_embedding: one warp per position ----

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

// With few positions, blocks of one warp reach more multiprocessors. Chosen by
// arithmetic, not yet measured.
inline LaunchShape hybrid_shape(int64_t positions, const Device& device) {
  return warps_shape(positions, positions <= 4 * device.multiprocessors ? 1 : kHybridWarps);
}

template <class E>
auto launch_hybrid_embedding(const HybridArgs& args, void* out, const Device& device,
                             Stream stream) {
  const LaunchShape shape = hybrid_shape(args.positions, device);
  if (args.k == 1) return launch(shape, stream, hybrid_embedding_kernel<E, 1>, args, out);
  return launch(shape, stream, hybrid_embedding_kernel<E, kMaxTopK>, args, out);
}

}  // namespace dmax::cuda
