// topk_confidence: the k most likely tokens of every row and their probabilities, descending.
#pragma once

#include "cuda/top_list.cuh"

namespace dmax::cuda {

struct TopkOutput {
  int64_t* tokens;     // [rows, k]
  float* confidences;  // [rows, k]
  int k;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, 3)
    topk_rows_kernel(const __grid_constant__ LogitsView<T> logits,
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

// Bytes of the lists, which follow the partial results in the scratch
inline size_t list_bytes(int64_t rows, const RowLaunch& launch, int k) {
  return static_cast<size_t>(rows) * launch.splits * k * sizeof(Rank);
}

template <class T>
RowLaunch choose_topk_launch(int64_t rows, int64_t vocab, const Device& device) {
  return choose_row_launch(rows, vocab, kTileSize<T>, sizeof(Top1Partial), device);
}

template <class T>
auto launch_topk_rows(const LogitsView<T>& logits, const RowLaunch& chosen, const RowSplit& split,
                      Rank* lists, const TopkOutput& out, Stream stream) {
  return launch(chosen.shape, stream, topk_rows_kernel<T>, logits, split, lists, out);
}

}  // namespace dmax::cuda
