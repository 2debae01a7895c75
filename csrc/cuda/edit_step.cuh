// edit_step_: threshold decoding with token editing, in one kernel.
//
// Phases, each entered by the last block to finish the one before, as in spd_step.cuh:
//   1. every block: its tiles of one position's vocabulary row, if the rule reads that position
//   2. last block of a position: its top-1
//   3. last block of a batch row: which positions change, and whether the row is done
// Blocks of a row that was done leave after the loads of a first tile and touch no counters. Those
// of a position that the rule does not read are counted all the same: a block that starts late
// would otherwise decide from the state that phase 3 has already changed.
#pragma once

#include "common/semantics.h"
#include "cuda/rows.cuh"

namespace dmax::cuda {

struct EditArgs {
  // State, [batch, block] unless stated otherwise
  const bool* editable;
  int64_t* token;
  int64_t* prediction;
  float* confidence;
  int32_t* post_edit_steps;  // [batch]
  bool* done;                // [batch]
  const float* thresholds;   // [batch, 2] = threshold, edit_threshold, or null
  int block;                 // K
  int64_t mask_token_id;
  float threshold, edit_threshold;
  EditRule rule;
  int tokens_per_step;
  int max_post_edit_steps;
  unsigned* row_counters;  // [batch]

  __device__ __forceinline__ bool masked(int64_t index) const {
    return editable[index] && token[index] == mask_token_id;
  }
};

__device__ __forceinline__ bool any_masked(const EditArgs& args, int64_t batch_row) {
  bool any = false;
  for (int i = static_cast<int>(threadIdx.x); i < args.block; i += kRowThreads)
    any = any || args.masked(batch_row * args.block + i);
  return __syncthreads_or(any) != 0;
}

// Whether the rule reads a position's logits: the same for all threads and for all of its blocks
__device__ __forceinline__ bool reads_position(const EditArgs& args, int64_t batch_row,
                                               int64_t index) {
  if (!args.editable[index]) return false;
  if (args.token[index] == args.mask_token_id) return true;
  if (args.rule != EditRule::kJointThreshold) return false;
  // Only in a row's last step can it be spent
  return args.post_edit_steps[batch_row] < args.max_post_edit_steps || any_masked(args, batch_row);
}

// The largest of all threads' keys
__device__ __forceinline__ uint64_t block_largest(uint64_t key) {
  __shared__ uint64_t of_warps[kRowWarps];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const auto other = __shfl_xor_sync(kFullMask, static_cast<unsigned long long>(key), lanes);
    if (other > key) key = other;
  }
  if (lane_id() == 0) of_warps[warp_id()] = key;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kRowWarps; ++w)
    if (of_warps[w] > key) key = of_warps[w];
  __syncthreads();  // before the next call writes
  return key;
}

// What the last block of a batch row reads of a position
struct EditPosition {
  bool masked, may_fill;
  int64_t prediction;
  float confidence;
};

__device__ __forceinline__ EditPosition position_of(const EditArgs& args, int64_t index) {
  const bool masked = args.masked(index);
  const auto prediction = static_cast<int64_t>(
      load_other_block_8(reinterpret_cast<const uint64_t*>(args.prediction + index)));
  return {masked, may_fill(args.rule, masked, prediction, args.mask_token_id), prediction,
          load_other_block_4(args.confidence + index)};
}

// Phase 3 for one batch row, by all threads of the block
__device__ __forceinline__ void update_row(const EditArgs& args, int64_t batch_row) {
  const int64_t base = batch_row * args.block;
  const auto thread = static_cast<int>(threadIdx.x);
  const bool filling = any_masked(args, batch_row);
  const int steps = args.post_edit_steps[batch_row] + (filling ? 0 : 1);
  const bool edits =
      args.rule == EditRule::kJointThreshold && !is_spent(filling, steps, args.max_post_edit_steps);

  // The best position, and the last one that is filled for its rank
  uint64_t best = 0;
  uint64_t least = 0;
  if (filling) {
    for (int n = 0; n < args.tokens_per_step; ++n) {
      uint64_t next = 0;
      for (int i = thread; i < args.block; i += kRowThreads) {
        const EditPosition p = position_of(args, base + i);
        const uint64_t key = p.may_fill ? order_key(p.confidence, i) : 0;
        if ((n == 0 || key < least) && key > next) next = key;
      }
      next = block_largest(next);
      if (n == 0) best = next;
      if (n > 0 && next < kLeastNumberKey) break;  // nothing is left, or NaN, which only leads
      least = next;
    }
  }

  const float* own = args.thresholds == nullptr ? nullptr : args.thresholds + 2 * batch_row;
  const float threshold = own == nullptr ? args.threshold : own[0];
  const float edit_threshold = own == nullptr ? args.edit_threshold : own[1];
  const float best_confidence = confidence_of_key(best);
  bool edited = false;
  // A thread reads and writes its own positions only, so no barrier has to come first
  for (int i = thread; i < args.block; i += kRowThreads) {
    const int64_t index = base + i;
    if (!args.editable[index]) continue;
    const EditPosition p = position_of(args, index);
    if (p.masked) {
      if (p.may_fill && (fills(args.rule, p.confidence, threshold, best_confidence) ||
                         order_key(p.confidence, i) >= least))
        args.token[index] = p.prediction;
    } else if (edits && passes(p.confidence, edit_threshold, false) &&
               p.prediction != args.token[index]) {
      args.token[index] = p.prediction;
      edited = true;
    }
  }
  const bool any_edited = __syncthreads_or(edited) != 0;
  if (thread == 0) {
    args.post_edit_steps[batch_row] = steps;
    if (!filling && !any_edited) args.done[batch_row] = true;
  }
}

constexpr int kEditResident = 3;  // blocks per multiprocessor: 80 registers a thread

template <class In>
__global__ void __launch_bounds__(kRowThreads, kEditResident)
    edit_step_kernel(const __grid_constant__ LogitsView<In> logits,
                     const __grid_constant__ RowSplit split,
                     const __grid_constant__ EditArgs args) {
  const TileRange range = block_tiles(split);
  const int64_t batch_row = static_cast<unsigned>(range.row) / static_cast<unsigned>(args.block);
  const bool done_before = args.done[batch_row];
  const bool unread = done_before || !reads_position(args, batch_row, range.row);

  RowMeeting<Top1Partial, false> meeting(split, range.row);
  scan_tiles<In, true>(logits, range, &meeting, unread);
  if (done_before || !meeting.gather()) return;

  if (warp_id() == 0 && !unread) {
    const SoftmaxStats stats = meeting.merged(logits.scale).stats;
    if (lane_id() == 0) {
      args.prediction[range.row] = stats.id;
      args.confidence[range.row] = top1_probability(stats);
    }
  }
  if (!last_to_arrive(args.row_counters + batch_row, args.block)) return;
  update_row(args, batch_row);
}

// ---- Host side ----

template <class In>
auto launch_edit_step(const RowLaunch& run, const LogitsView<In>& logits, const EditArgs& args,
                      Stream stream) {
  return launch(run.shape, stream, edit_step_kernel<In>, logits, run.split, args);
}

}  // namespace dmax::cuda
