// token_logprobs: log-probabilities and ranks of given tokens, and the most likely tokens beside
// them, in one read of the logits.
//
// A warp counts the elements of its tile that come before each of the row's tokens, whose logits it
// looks up first. The counts of all tiles lie in global scratch until the row's last block adds
// them.
#pragma once

#include "cuda/loss.cuh"
#include "cuda/top_list.cuh"

namespace dmax::cuda {

// The tokens of every row, [rows, per_row]
struct RowTokens {
  Targets ids;
  int per_row;
  int64_t ignore_index;

  __device__ __forceinline__ int64_t of(int64_t row, int j) const {
    return ids.of(row * per_row + j);
  }
};

// The plain kernels suppress no id
template <class T>
__device__ __forceinline__ float logit_of(const Row<T>& row, int /*hidden*/, int64_t id) {
  return to_float(row.data[id]);
}
template <class T>
__device__ __forceinline__ float logit_of(const Row<T>& row, const MaskedIds& hidden, int64_t id) {
  return is_hidden(hidden, static_cast<int>(id)) ? -INFINITY : to_float(row.data[id]);
}

// How many elements of the tile come before token `id` of the row: NaN first, then the larger
// value, then the lower id. The same on every lane.
template <class T, class Hidden>
__device__ __forceinline__ float count_before(Tile<T>& tile, const Row<T>& row,
                                              const Hidden& hidden, const SoftmaxStats& stats,
                                              int id) {
  const float value = logit_of(row, hidden, id);
  const Rank rank = rank_of(value, id);
  if (rank_of(stats.max, stats.id) <= rank) return 0.0f;
  float count = 0.0f;
  const bool before = tile.begin + kTileSize<T> <= id;
  if (value == value && (before || tile.begin > id)) {
    // A NaN is neither below nor equal; the -inf past the row's end never count
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kWidth<T>; ++e) {
        const float x = tile.at(v, e);
        count += (before ? x < value : x <= value) ? 0.0f : 1.0f;
      }
    }
  } else {  // the tile that holds the token, or a row with a NaN
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      forget(tile.raw[v]);  // as in best_below()
#pragma unroll
      for (int e = 0; e < kWidth<T>; ++e) {
        const int other = tile.id(v, e);
        count += other < row.vocab && rank_of(tile.at(v, e), other) > rank ? 1.0f : 0.0f;
      }
    }
  }
  return warp_sum(count);
}

struct LogprobsOutput {
  float* logprob;       // [rows, per_row]
  int64_t* rank;        // [rows, per_row]
  int64_t* top_ids;     // [rows, top_n]
  float* top_logprobs;  // [rows, top_n]
  float* logsumexp;     // [rows]
  int top_n;
  float inverse_temperature;
};

// Blocks per multiprocessor: 128 registers a thread, or 80
template <bool kLists>
constexpr int kLogprobsResident = kLists ? 2 : 3;

// counts is [rows, tiles, per_row]
template <class In, bool kLists>
__global__ void __launch_bounds__(kRowThreads, kLogprobsResident<kLists>)
    token_logprobs_kernel(const __grid_constant__ LogitsView<In> logits,
                          const __grid_constant__ RowSplit split,
                          const __grid_constant__ RowTokens tokens, float* counts, Rank* lists,
                          const __grid_constant__ LogprobsOutput out) {
  const TileRange range = block_tiles(split);
  using T = ElementOf<In>;
  const Row<T> row = logits.row(range.row);
  const auto hidden = logits.hidden(range.row);
  float* row_counts = counts + range.row * split.tiles * tokens.per_row;
  const auto count_tokens = [&](Tile<T>& tile, const SoftmaxStats& stats, int t) {
    for (int j = 0; j < tokens.per_row; ++j) {
      const int64_t id = tokens.of(range.row, j);
      if (id < 0 || id >= row.vocab) continue;
      const float count = count_before(tile, row, hidden, stats, static_cast<int>(id));
      if (lane_id() == 0) row_counts[t * tokens.per_row + j] = count;
    }
  };
  RowMeeting<Top1Partial, false> meeting(split, range.row);
  if constexpr (kLists) {
    scan_tiles_and_list<In, false, kMaxTopLogprobs>(logits, split, range, lists, out.top_n, false,
                                                    count_tokens);
  } else {
    scan_tiles<In, false>(logits, range, &meeting, false, count_tokens);
  }
  if (!meeting.gather() || warp_id() != 0) return;

  const SoftmaxStats stats = meeting.merged(logits.scale).stats;
  const float log_sum = is_finite(stats.max) ? log1pf(stats.rest) : NAN;
  const auto logprob_of = [&](float value) {
    return (value - stats.max) * out.inverse_temperature - log_sum;
  };
  if (lane_id() == 0) out.logsumexp[range.row] = fmaf(stats.max, out.inverse_temperature, log_sum);
  for (int j = 0; j < tokens.per_row; ++j) {
    const int64_t id = tokens.of(range.row, j);
    const bool inside = id >= 0 && id < row.vocab;
    int rank = 0;
    for (int t = lane_id(); inside && t < split.tiles; t += kWarpSize)
      rank += static_cast<int>(load_other_block_4(row_counts + t * tokens.per_row + j));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) rank += __shfl_xor_sync(kFullMask, rank, lanes);
    if (lane_id() != 0) continue;
    const int64_t at = range.row * tokens.per_row + j;
    out.logprob[at] = id == tokens.ignore_index ? 0.0f
                      : inside                  ? logprob_of(logit_of(row, hidden, id))
                                                : NAN;
    out.rank[at] = inside && id != tokens.ignore_index ? rank : -1;
  }
  if (!kLists) return;
  const TopList list = merge_lists(split, lists, range.row, out.top_n);
  if (lane_id() >= out.top_n) return;
  const int64_t place = range.row * out.top_n + lane_id();
  const int id = id_of(list.mine);
  out.top_ids[place] = id;
  out.top_logprobs[place] = logprob_of(logit_of(row, hidden, id));
}

inline int logprobs_resident(int top_n) {
  return top_n > 0 ? kLogprobsResident<true> : kLogprobsResident<false>;
}

template <class In>
auto launch_token_logprobs(const RowLaunch& run, const LogitsView<In>& logits,
                           const RowTokens& tokens, float* counts, Rank* lists,
                           const LogprobsOutput& out, Stream stream) {
  const auto kernel =
      out.top_n > 0 ? token_logprobs_kernel<In, true> : token_logprobs_kernel<In, false>;
  return launch(run.shape, stream, kernel, logits, run.split, tokens, counts, lists, out);
}

// Bytes of the counts that the tiles of a launch leave
inline size_t count_bytes(const RowLaunch& run, int64_t rows, int64_t per_row) {
  return size_t(rows) * run.split.tiles * per_row * sizeof(float);
}

}  // namespace dmax::cuda
