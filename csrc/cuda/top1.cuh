// Top-1 and top-k of every row, of a whole vocabulary or of one shard, and how the partial results
// of the shards become one.
#pragma once

#include "cuda/top_list.cuh"

namespace dmax::cuda {

// ---- top1_confidence, top1_partial ----

constexpr int kTop1Resident = 4;         // blocks per multiprocessor: 64 registers a thread
constexpr int kTop1MaskedResident = 3;   // 80: with 64, rows with a mask spill on sm_80
constexpr int kTop1ClusterResident = 3;  // 64

// finish(row, stats) stores what the op makes of a row's statistics; one thread calls it
template <class In, class Finish, bool kCluster>
__global__ void __launch_bounds__(kBlockThreads<kCluster>, kCluster        ? kTop1ClusterResident
                                                           : kIsMasked<In> ? kTop1MaskedResident
                                                                           : kTop1Resident)
    top1_rows_kernel(const __grid_constant__ LogitsView<In> logits,
                     const __grid_constant__ RowSplit split,
                     const __grid_constant__ Finish finish) {
  const TileRange range = block_tiles<kCluster>(split);
  RowMeeting<Top1Partial, kCluster> meeting(split, range.row);
  scan_tiles<In, false>(logits, range, &meeting);
  if (!meeting.gather() || warp_id() != 0) return;
  const SoftmaxStats stats = meeting.merged(logits.scale).stats;
  if (lane_id() == 0) finish(range.row, stats);
}

template <class In, class Finish>
auto launch_top1_rows(const RowLaunch& run, const LogitsView<In>& logits, const Finish& finish,
                      Stream stream) {
  auto kernel = top1_rows_kernel<In, Finish, false>;
  if constexpr (!kIsMasked<In>) {
    if (run.cluster()) kernel = top1_rows_kernel<In, Finish, true>;
  }
  return launch(run.shape, stream, kernel, logits, run.split, finish);
}

inline RowWork top1_work(int64_t rows, int64_t vocab, bool masked = false) {
  return {rows, vocab, masked ? kTop1MaskedResident : kTop1Resident, 0, !masked};
}

struct Top1ConfidenceFinish {
  int64_t* token;
  float* confidence;

  __device__ __forceinline__ void operator()(int64_t row, const SoftmaxStats& stats) const {
    token[row] = stats.id;
    confidence[row] = top1_probability(stats);
  }
};

struct Top1PartialFinish {
  float* maximum;
  float* sum_exp;
  int64_t* token;
  int64_t vocab_start;

  __device__ __forceinline__ void operator()(int64_t row, const SoftmaxStats& stats) const {
    maximum[row] = stats.max;
    sum_exp[row] = is_finite(stats.max) ? 1.0f + stats.rest : stats.max == -INFINITY ? 0.0f : NAN;
    token[row] = vocab_start + stats.id;
  }
};

// ---- topk_confidence ----

constexpr int kTopkResident = 3;  // 80 registers a thread

struct TopkOutput {
  int64_t* tokens;     // [rows, k]
  float* confidences;  // [rows, k]
  int k;
};

template <class In>
__global__ void __launch_bounds__(kRowThreads, kTopkResident)
    topk_rows_kernel(const __grid_constant__ LogitsView<In> logits,
                     const __grid_constant__ RowSplit split, Rank* lists,
                     const __grid_constant__ TopkOutput out) {
  const TileRange range = block_tiles(split);
  scan_tiles_and_list(logits, split, range, lists, out.k);
  if (!last_of_row(split, range.row) || warp_id() != 0) return;
  const SoftmaxStats stats = merge_row<Top1Partial>(split, range.row, logits.scale).stats;
  const TopList list = merge_lists(split, lists, range.row, out.k);
  if (lane_id() >= out.k) return;
  const int64_t place = range.row * out.k + lane_id();
  out.tokens[place] = id_of(list.mine);
  out.confidences[place] = listed_probability(list.mine, stats, logits.scale);
}

template <class In>
auto launch_topk_rows(const RowLaunch& run, const LogitsView<In>& logits, Rank* lists,
                      const TopkOutput& out, Stream stream) {
  return launch(run.shape, stream, topk_rows_kernel<In>, logits, run.split, lists, out);
}

}  // namespace dmax::cuda
