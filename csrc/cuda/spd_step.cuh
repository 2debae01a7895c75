// spd_step_: Algorithm 1, lines 4-12, in one kernel.
//
// Phases, each entered by the last block to finish the one before:
//   1. every block: its tiles of one position's vocabulary row
//   2. last block of a position: top-1 (and top-k), and the embedding it will most likely need
//   3. last block of a batch row: promotion, convergence, state, and the embeddings that phase 2
//      guessed wrong
// No block waits for another, so the kernel cannot deadlock, however few blocks are resident. Every
// block leaves a row that had converged after the loads of a first tile: it uses no logits and
// touches no counters.
#pragma once

#include "cuda/spd_phases.cuh"

namespace dmax::cuda {

constexpr int kSpdResident = 3;         // blocks per multiprocessor: 80 registers a thread
constexpr int kSpdClusterResident = 2;  // 96

template <class In, int kTokens, bool kCluster>
__global__ void __launch_bounds__(kBlockThreads<kCluster>,
                                  kCluster ? kSpdClusterResident : kSpdResident)
    spd_step_kernel(const __grid_constant__ LogitsView<In> logits,
                    const __grid_constant__ RowSplit split, const __grid_constant__ SpdArgs args) {
  const TileRange range = block_tiles<kCluster>(split);
  RowMeeting<Top1Partial, kCluster> meeting(split, range.row);
  const int64_t batch_row = static_cast<unsigned>(range.row) / static_cast<unsigned>(args.block);
  const bool converged_before = args.converged[batch_row];

  if constexpr (kTokens > 1) {
    scan_tiles_and_list<In, true>(logits, split, range, args.lists, args.top_k, converged_before);
  } else {
    scan_tiles<In, true>(logits, range, &meeting, converged_before);
  }
  if (converged_before) return meeting.leave();
  if (!meeting.gather()) return;

  predict<kTokens>(logits.scale, split, meeting, args, range.row);
  if (last_to_arrive(args.row_counters + batch_row, args.block))
    finish_row<kTokens>(args, batch_row);
}

// ---- Host side ----

template <class In>
auto launch_spd_step(const RowLaunch& run, const LogitsView<In>& logits, const SpdArgs& args,
                     Stream stream) {
  auto kernel =
      args.top_k > 1 ? spd_step_kernel<In, kMaxTopK, false> : spd_step_kernel<In, 1, false>;
  if constexpr (!kIsMasked<In>) {
    if (run.cluster()) kernel = spd_step_kernel<In, 1, true>;
  }
  return launch(run.shape, stream, kernel, logits, run.split, args);
}

// One counter per batch row, for phase 3
inline RowWork spd_work(int64_t rows, int64_t vocab, int64_t batch, int64_t top_k,
                        bool masked = false) {
  return {rows, vocab, kSpdResident, batch, top_k == 1 && !masked};
}

}  // namespace dmax::cuda
