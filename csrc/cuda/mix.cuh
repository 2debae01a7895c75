// The mix of token and mask embeddings, eqs. 8-10, for one position by a warp or by a block:
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

// kW elements as they are in memory: 16 bytes, or one element of a row that is not aligned
template <class E, int kW>
struct RawElements {
  uint4 vector{0, 0, 0, 0};
  __device__ __forceinline__ void load(const E* p) { vector = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ float at(int e) const { return element<E>(vector, e); }
};
template <class E>
struct RawElements<E, 1> {
  E one{};
  __device__ __forceinline__ void load(const E* p) { one = *p; }
  __device__ __forceinline__ float at(int) const { return to_float(one); }
};

template <class E, int kW>
__device__ __forceinline__ void load_elements(const E* p, float (&out)[kW]) {
  RawElements<E, kW> raw;
  raw.load(p);
#pragma unroll
  for (int e = 0; e < kW; ++e) out[e] = raw.at(e);
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

// Who works on a position: the team's member i takes the vectors i, i + kThreads, ... of the row.
// kKept: how many of them stay in registers from the norms to the scaled mix of one token; the
// others are read again. kGroup: rows of several tokens that are loaded together.

struct WarpTeam {
  static constexpr int kThreads = kWarpSize;
  static constexpr int kKept = 0;
  static constexpr int kGroup = 1;  // spd_step_ has no registers for more

  __device__ __forceinline__ int index() const { return lane_id(); }
  template <int kN>
  __device__ __forceinline__ void sum(float (&values)[kN]) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) values[i] = warp_sum(values[i]);
  }
};

// Eight warps: with a vector per thread, a row of 2,048 16-bit elements is read at once. A block's
// further warps take part in nothing but its barrier. sum() may be called once in a kernel.
struct BlockTeam {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kKept = 2;
  static constexpr int kGroup = 2;

  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x); }
  template <int kN>
  __device__ __forceinline__ void sum(float (&values)[kN]) const {
    __shared__ float of_warps[kWarps][kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float mine = warp_sum(values[i]);
      if (lane_id() == 0 && warp_id() < kWarps) of_warps[warp_id()][i] = mine;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      values[i] = of_warps[0][i];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) values[i] += of_warps[w][i];
    }
  }
};

// Lane j < k of every warp holds the j-th token and its probability
struct Mix {
  int64_t token;
  float probability;
  int k;
};

template <class E, int kW, class Team>
__device__ __forceinline__ void copy_embedding(const EmbeddingTable& table, int64_t token, E* out,
                                               const Team& team) {
  const E* row = static_cast<const E*>(table.data) + token * table.row_stride;
  const bool inside = in_table(table, token);
  if (team.index() >= Team::kThreads) return;
  for (int d = team.index() * kW; d < table.dim; d += Team::kThreads * kW) {
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

// The unscaled mix at `d`, or 0 where not `inside`. The loads of the mask's row and of kGroup
// tokens' rows are under way before the first is used.
template <class E, int kW, int kTokens, int kGroup = 1>
__device__ __forceinline__ void mix_at(const EmbeddingTable& table, const Mix& mix, float residual,
                                       int d, float (&sum)[kW], float (&squares)[kTokens],
                                       float* mask_square, bool inside = true) {
  const E* data = static_cast<const E*>(table.data) + d;
  RawElements<E, kW> of_mask;
  if (inside) of_mask.load(data + table.mask_token_id * table.row_stride);
#pragma unroll
  for (int first = 0; first < kTokens; first += kGroup) {
    RawElements<E, kW> of_tokens[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int64_t token = kTokens == 1 ? mix.token : __shfl_sync(kFullMask, mix.token, first + j);
      if (inside && (kTokens == 1 || first + j < mix.k))
        of_tokens[j].load(data + token * table.row_stride);
    }
    if (first == 0) {
#pragma unroll
      for (int e = 0; e < kW; ++e) {
        const float value = of_mask.at(e);
        sum[e] = residual * value;
        *mask_square = fmaf(value, value, *mask_square);
      }
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float p =
          kTokens == 1 ? mix.probability : __shfl_sync(kFullMask, mix.probability, first + j);
      if (kTokens > 1 && first + j >= mix.k) continue;
#pragma unroll
      for (int e = 0; e < kW; ++e) {
        const float value = of_tokens[j].at(e);
        sum[e] = fmaf(p, value, sum[e]);
        squares[first + j] = fmaf(value, value, squares[first + j]);
      }
    }
    if (kTokens > 1 && first + kGroup >= mix.k) break;
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

// Sums of squares over a row, on their way to the norms
template <int kTokens>
struct MixSquares {
  float mix, mask;
  float tokens[kTokens];
};

// The team's vector `i` of every member: the unscaled mix in `sum`, its squares added to `squares`
template <class E, int kW, int kTokens, class Team>
__device__ __forceinline__ void mix_vector(const EmbeddingTable& table, const Mix& mix,
                                           float residual, const Team& team, int i,
                                           float (&sum)[kW], MixSquares<kTokens>* squares) {
  const int d = (team.index() + i * Team::kThreads) * kW;
  const bool inside = team.index() < Team::kThreads && d < table.dim;
  mix_at<E, kW, kTokens, kTokens == 1 ? 1 : Team::kGroup>(table, mix, residual, d, sum,
                                                          squares->tokens, &squares->mask, inside);
#pragma unroll
  for (int e = 0; e < kW; ++e) squares->mix = fmaf(sum[e], sum[e], squares->mix);
}

template <class E, int kW, class Team>
__device__ __forceinline__ int last_vector(const EmbeddingTable& table) {
  return (table.dim - 1) / (Team::kThreads * kW);
}

template <class Team, int kTokens>
constexpr int kKeptVectors = kTokens == 1      ? Team::kKept
                             : Team::kKept > 0 ? 1
                                               : 0;
template <class Team, int kTokens>
constexpr int kAtLeastOne = kKeptVectors<Team, kTokens> > 0 ? kKeptVectors<Team, kTokens> : 1;

// `kept` receives the unscaled mix at each member's first kKeptVectors vectors
template <class E, int kW, int kTokens, class Team>
__device__ __forceinline__ MixNorms mix_norms(const EmbeddingTable& table, const Mix& mix,
                                              const Team& team,
                                              float (&kept)[kAtLeastOne<Team, kTokens>][kW]) {
  constexpr int kKept = kKeptVectors<Team, kTokens>;
  MixNorms norms;
  const float p = lane_id() < mix.k ? mix.probability : 0.0f;
  norms.residual = 1.0f - (kTokens == 1 ? mix.probability : warp_sum(p));
  if (norms.residual < 0.0f) norms.residual = 0.0f;  // a NaN stays NaN
  MixSquares<kTokens> squares{};
  const int last = last_vector<E, kW, Team>(table);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (i <= last)
      mix_vector<E, kW, kTokens>(table, mix, norms.residual, team, i, kept[i], &squares);
  }
#pragma unroll(kW == 1 || kTokens > 1 || kKept > 0 ? 1 : 2)
  for (int i = kKept; i <= last; ++i) {
    float sum[kW];
    mix_vector<E, kW, kTokens>(table, mix, norms.residual, team, i, sum, &squares);
  }
  float sums[2 + kTokens];
  sums[0] = squares.mix;
  sums[1] = squares.mask;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) sums[2 + j] = squares.tokens[j];
  team.sum(sums);
  norms.norm = sqrtf(sums[0]);
  norms.mask_norm = sqrtf(sums[1]);
  norms.token_norm = 0.0f;
  norms.target = norms.residual * norms.mask_norm;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (j >= mix.k) break;
    const float norm = sqrtf(sums[2 + j]);
    const float weight =
        kTokens == 1 ? mix.probability : __shfl_sync(kFullMask, mix.probability, j);
    norms.target = fmaf(weight, norm, norms.target);
    if (lane_id() == j) norms.token_norm = norm;
  }
  return norms;
}

template <class E, int kW, int kTokens, class Team>
__device__ __forceinline__ void hybrid_row(const EmbeddingTable& table, const Mix& mix, E* out,
                                           const Team& team) {
  constexpr int kKept = kKeptVectors<Team, kTokens>;
  float kept[kAtLeastOne<Team, kTokens>][kW];
  const MixNorms norms = mix_norms<E, kW, kTokens>(table, mix, team, kept);
  const float scale = norms.scale();
  const auto store = [&](int i, float(&sum)[kW]) {
    const int d = (team.index() + i * Team::kThreads) * kW;
#pragma unroll
    for (int e = 0; e < kW; ++e) sum[e] *= scale;
    if (team.index() < Team::kThreads && d < table.dim) store_elements<E, kW>(out + d, sum);
  };
  const int last = last_vector<E, kW, Team>(table);
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    if (i <= last) store(i, kept[i]);
#pragma unroll(kW == 1 || kTokens > 1 || kKept > 0 ? 1 : 2)
  for (int i = kKept; i <= last; ++i) {
    float sum[kW];
    MixSquares<kTokens> unused{};
    mix_vector<E, kW, kTokens>(table, mix, norms.residual, team, i, sum, &unused);
    store(i, sum);
  }
}

// What an input position of the next forward pass holds
enum class Embedding { kMask, kHybrid, kToken };

// Writes row `position` of `out` [positions, dim]: e(mask), the mix, or e(the mix's first token)
template <class E, int kTokens, class Team>
__device__ __forceinline__ void write_embedding(const EmbeddingTable& table, Embedding kind,
                                                const Mix& mix, void* out, int64_t position,
                                                const Team& team) {
  E* row = static_cast<E*>(out) + position * table.dim;
  int64_t hard =
      kind == Embedding::kMask ? table.mask_token_id : __shfl_sync(kFullMask, mix.token, 0);
  if (kind == Embedding::kHybrid) {
    const bool outside = lane_id() < mix.k && !in_table(table, mix.token);
    if (__ballot_sync(kFullMask, outside) == 0) {
      if (table.vectors) return hybrid_row<E, kWidth<E>, kTokens>(table, mix, row, team);
      return hybrid_row<E, 1, kTokens>(table, mix, row, team);
    }
    hard = -1;  // a row of NaN
  }
  if (table.vectors) return copy_embedding<E, kWidth<E>>(table, hard, row, team);
  copy_embedding<E, 1>(table, hard, row, team);
}

}  // namespace dmax::cuda
