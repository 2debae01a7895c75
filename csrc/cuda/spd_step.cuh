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

#include "common/semantics.h"
#include "cuda/embedding.cuh"
#include "cuda/top_list.cuh"

namespace dmax::cuda {

// What phase 2 tells phase 3 about a position
struct alignas(16) Prediction {
  float confidence;
  int32_t token;
  int32_t written;  // the Embedding that phase 2 wrote, or -1
  int32_t unused;
};

// One of a position's top-k
struct alignas(8) Listed {
  float confidence;
  int32_t token;
};

struct SpdArgs {
  // State, [batch, block] unless stated otherwise
  const bool* editable;
  bool* masked;
  int64_t* token;
  float* confidence;
  bool* converged;          // [batch]
  int32_t* step;            // [batch]
  void* inputs_embeds;      // [batch, block, dim]
  const float* thresholds;  // [batch, 2] = tau_dec, tau_acc, or null
  EmbeddingTable table;
  int block;  // K
  int top_k;
  float tau_dec, tau_acc;
  Semantics semantics;

  // Scratch
  Prediction* predictions;  // [batch, block]
  Rank* lists;              // [batch, block, splits, top_k] where top_k > 1
  Listed* listed;           // [batch, block, top_k] where top_k > 1
  unsigned* row_counters;   // [batch]
};

// Not inlined: it has two callers and three dtypes, and each case is a few hundred instructions
template <int kTokens>
__device__ __noinline__ void write_position(const SpdArgs& args, Embedding kind, int64_t token,
                                            float probability, int64_t position) {
  const Mix mix{token, probability, args.top_k};
  void* out = args.inputs_embeds;
  switch (args.table.type) {
    case ElementType::kFloat:
      return write_embedding<float, kTokens>(args.table, kind, mix, out, position);
    case ElementType::kBFloat16:
      return write_embedding<BFloat16, kTokens>(args.table, kind, mix, out, position);
    case ElementType::kFloat16:
      return write_embedding<Float16, kTokens>(args.table, kind, mix, out, position);
  }
}

struct Thresholds {
  float decode, accept;
};

__device__ __forceinline__ Thresholds thresholds_of(const SpdArgs& args, int64_t batch_row) {
  if (args.thresholds == nullptr) return {args.tau_dec, args.tau_acc};
  return {args.thresholds[2 * batch_row], args.thresholds[2 * batch_row + 1]};
}

__device__ __forceinline__ Embedding embedding_kind(bool masked, bool editable) {
  return masked ? Embedding::kMask : editable ? Embedding::kHybrid : Embedding::kToken;
}

// ---- Phase 2, by one warp ----

// What the position will hold if the masked positions before it all pass and the row goes on
__device__ __forceinline__ Embedding likely_embedding(const SpdArgs& args, int64_t batch_row,
                                                      int position, float confidence) {
  const bool* masked = args.masked + batch_row * args.block;
  bool stays_masked = masked[position];
  if (stays_masked && passes(confidence, thresholds_of(args, batch_row).decode, false))
    stays_masked = false;
  if (stays_masked) {  // the first masked position is promoted whatever its confidence
    bool first = true;
    for (int i = lane_id(); i < position; i += kWarpSize) first = first && !masked[i];
    stays_masked = __ballot_sync(kFullMask, !first) != 0;
  }
  return embedding_kind(stays_masked, args.editable[batch_row * args.block + position]);
}

template <class T, int kTokens>
__device__ __forceinline__ void predict(const LogitsView<T>& logits, const RowSplit& split,
                                        const SpdArgs& args, int64_t index) {
  const SoftmaxStats stats = merge_row<Top1Partial>(split, index, logits.scale).stats;
  const float confidence = top1_probability(stats);
  Mix mix{stats.id, confidence, args.top_k};
  if constexpr (kTokens > 1) {
    const TopList list = merge_lists(split, args.lists, index, args.top_k);
    if (lane_id() < args.top_k) {
      mix.token = id_of(list.mine);
      mix.probability = listed_probability(list.mine, stats, logits.scale);
      args.listed[index * args.top_k + lane_id()] = {mix.probability, id_of(list.mine)};
    }
  }

  // The authors' loop leaves the embeddings of its last step alone: there phase 3 has to decide
  int written = -1;
  if (args.semantics != Semantics::kReleased) {
    const int64_t batch_row = index / args.block;
    const auto position = static_cast<int>(index % args.block);
    const Embedding kind = likely_embedding(args, batch_row, position, confidence);
    if (kind == Embedding::kToken) mix.token = args.token[index];
    write_position<kTokens>(args, kind, mix.token, mix.probability, index);
    written = static_cast<int>(kind);
  }
  if (lane_id() == 0) args.predictions[index] = {confidence, stats.id, written, 0};
}

// ---- Phase 3, by one block ----

__device__ __forceinline__ int block_min(int value) {
  __shared__ int of_warps[kRowWarps];
  const int mine = warp_first(value);
  if (lane_id() == 0) of_warps[warp_id()] = mine;
  __syncthreads();
  int least = of_warps[0];
#pragma unroll
  for (int w = 1; w < kRowWarps; ++w) least = min(least, of_warps[w]);
  __syncthreads();  // before the next call writes
  return least;
}

// Lines 5-12 for one batch row, by all threads of the block; true if the row has converged
__device__ __forceinline__ bool update_state(const SpdArgs& args, int64_t batch_row) {
  const int64_t base = batch_row * args.block;
  const Thresholds tau = thresholds_of(args, batch_row);
  const auto thread = static_cast<int>(threadIdx.x);
  const bool released = args.semantics == Semantics::kReleased;
  const bool settled = args.semantics == Semantics::kSettled;

  // Where the promoted run ends, and what rules out convergence
  int first_masked = args.block;
  int first_failed = args.block;
  bool sure = true;
  bool same = true;
  for (int i = thread; i < args.block; i += kRowThreads) {
    const Prediction p = load_other_block(args.predictions + base + i);
    const bool masked = args.masked[base + i];
    if (masked) {
      first_masked = min(first_masked, i);
      if (!passes(p.confidence, tau.decode, released)) first_failed = min(first_failed, i);
    }
    if (args.editable[base + i]) {
      sure = sure && passes(p.confidence, tau.accept, released);
      // Settled: a prediction at a masked position is no decision yet, even if it repeats
      same = same && !(settled && masked) && p.token == args.token[base + i];
    }
  }
  first_masked = block_min(first_masked);
  first_failed = block_min(first_failed);
  const bool confident = __syncthreads_and(sure) != 0;
  bool consistent;
  if (released) {  // no updated position changes
    bool changed = false;
    for (int i = thread; i < args.block; i += kRowThreads) {
      const bool masked = args.masked[base + i];
      const bool updated = is_promoted(i, masked, first_masked, first_failed) ||
                           (args.editable[base + i] && !masked);
      const Prediction p = load_other_block(args.predictions + base + i);
      changed = changed || (updated && p.token != args.token[base + i]);
    }
    consistent = __syncthreads_or(changed) == 0;
  } else {
    consistent = __syncthreads_and(same) != 0 && args.step[batch_row] >= 1;
  }
  const bool converged = confident || consistent;  // a row with nothing to decode is confident

  // The new state. No barrier comes before it: a thread reads and writes its own positions only.
  for (int i = thread; i < args.block; i += kRowThreads) {
    const Prediction p = load_other_block(args.predictions + base + i);
    const bool editable = args.editable[base + i];
    const bool masked = args.masked[base + i];
    const bool promoted = is_promoted(i, masked, first_masked, first_failed);
    const bool takes = released ? promoted || (editable && !masked) : editable;
    const int64_t token = takes ? p.token : args.token[base + i];
    args.token[base + i] = token;
    if (editable) args.confidence[base + i] = p.confidence;
    args.masked[base + i] = released ? editable && token == args.table.mask_token_id
                                     : masked && !promoted && !converged;
  }
  __syncthreads();  // the embeddings read it
  if (thread == 0) {
    args.step[batch_row] += 1;
    if (converged) args.converged[batch_row] = true;
  }
  return converged;
}

template <int kTokens>
__device__ __forceinline__ Mix mix_of(const SpdArgs& args, const Prediction& p, int64_t index) {
  Mix mix{p.token, p.confidence, args.top_k};
  if constexpr (kTokens > 1) {
    if (lane_id() < args.top_k) {
      const uint64_t bits = load_other_block_8(
          reinterpret_cast<const uint64_t*>(args.listed + index * args.top_k + lane_id()));
      mix.probability = __uint_as_float(static_cast<uint32_t>(bits));
      mix.token = static_cast<int32_t>(bits >> 32);
    }
  }
  return mix;
}

template <int kTokens>
__device__ __forceinline__ void write_embeddings(const SpdArgs& args, int64_t batch_row) {
  for (int i = warp_id(); i < args.block; i += kRowWarps) {
    const int64_t index = batch_row * args.block + i;
    const Prediction p = load_other_block(args.predictions + index);
    const Embedding kind = embedding_kind(args.masked[index], args.editable[index]);
    if (static_cast<int>(kind) == p.written) continue;
    Mix mix = mix_of<kTokens>(args, p, index);
    if (kind == Embedding::kToken) mix.token = args.token[index];
    write_position<kTokens>(args, kind, mix.token, mix.probability, index);
  }
}

constexpr int kSpdResident = 3;  // blocks per multiprocessor: 80 registers a thread

template <class T, int kTokens>
__global__ void __launch_bounds__(kRowThreads, kSpdResident)
    spd_step_kernel(const __grid_constant__ LogitsView<T> logits,
                    const __grid_constant__ RowSplit split, const __grid_constant__ SpdArgs args) {
  const TileRange range = block_tiles(split);
  const int64_t batch_row = static_cast<unsigned>(range.row) / static_cast<unsigned>(args.block);
  const bool converged_before = args.converged[batch_row];

  if constexpr (kTokens > 1) {
    scan_tiles_and_list<T, true>(logits, split, range, args.lists, args.top_k, converged_before);
  } else {
    scan_tiles<T, true>(logits, split, range, converged_before);
  }
  if (converged_before) return;
  if (!last_of_row(split, range.row)) return;

  if (warp_id() == 0) predict<T, kTokens>(logits, split, args, range.row);
  if (!last_to_arrive(args.row_counters + batch_row, args.block)) return;

  const bool converged = update_state(args, batch_row);
  if (args.semantics == Semantics::kReleased && converged) {
    // Left alone, unless there was nothing to decode and this was the only step
    bool any_editable = false;
    for (int i = static_cast<int>(threadIdx.x); i < args.block; i += kRowThreads)
      any_editable = any_editable || args.editable[batch_row * args.block + i];
    if (__syncthreads_or(any_editable) != 0) return;
  }
  write_embeddings<kTokens>(args, batch_row);
}

// ---- Host side ----

template <class T>
auto launch_spd_step(const RowLaunch& run, const LogitsView<T>& logits, const SpdArgs& args,
                     Stream stream) {
  const auto kernel = args.top_k == 1 ? spd_step_kernel<T, 1> : spd_step_kernel<T, kMaxTopK>;
  return launch(run.shape, stream, kernel, logits, run.split, args);
}

}  // namespace dmax::cuda
