// Top-1 of every row, for the ops that differ in what they make of a row's statistics.
#pragma once

#include "cuda/rows.cuh"

namespace dmax::cuda {

// Finish: what one thread stores for a row: finish(row, stats)
template <class T, class Finish>
__global__ void __launch_bounds__(kRowThreads, 4)
    top1_rows_kernel(const __grid_constant__ LogitsView<T> logits,
                     const __grid_constant__ RowSplit split,
                     const __grid_constant__ Finish finish) {
  const TileRange range = block_tiles(split);
  scan_tiles(logits, split, range);
  if (!last_of_row(split, range.row) || warp_id() != 0) return;
  const SoftmaxStats stats = merge_row<Top1Partial>(split, range.row, logits.scale).stats;
  if (lane_id() == 0) finish(range.row, stats);
}

template <class T>
RowLaunch choose_top1_launch(int64_t rows, int64_t vocab, const Device& device) {
  return choose_row_launch(rows, vocab, kTileSize<T>, sizeof(Top1Partial), device);
}

template <class T, class Finish>
auto launch_top1_rows(const LogitsView<T>& logits, const RowLaunch& chosen, const RowSplit& split,
                      const Finish& finish, Stream stream) {
  return launch(chosen.shape, stream, top1_rows_kernel<T, Finish>, logits, split, finish);
}

}  // namespace dmax::cuda
