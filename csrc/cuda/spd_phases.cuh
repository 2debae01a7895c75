// The second and the third phase of spd_step_ (spd_step.cuh): a position's prediction and the
// embedding it will most likely need, then a batch row's decisions, state and other embeddings.
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
template <int kTokens, class Team>
__device__ __noinline__ void write_position(const SpdArgs& args, Embedding kind, int64_t token,
                                            float probability, int64_t position) {
  const Mix mix{token, probability, args.top_k};
  void* out = args.inputs_embeds;
  switch (args.table.type) {
    case ElementType::kFloat:
      return write_embedding<float, kTokens>(args.table, kind, mix, out, position, Team{});
    case ElementType::kBFloat16:
      return write_embedding<BFloat16, kTokens>(args.table, kind, mix, out, position, Team{});
    case ElementType::kFloat16:
      return write_embedding<Float16, kTokens>(args.table, kind, mix, out, position, Team{});
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

// ---- Phase 2, by one block ----

// What phase 2 reads of the state, while the row's statistics are merged
struct Place {
  int64_t token;
  float tau_decode;
  bool masked, editable;
  bool first;  // no masked position comes before it

  // What the position will hold if the masked positions before it all pass and the row goes on. The
  // first masked position is promoted whatever its confidence.
  __device__ __forceinline__ Embedding likely_embedding(float confidence) const {
    const bool stays_masked = masked && !first && !passes(confidence, tau_decode, false);
    return embedding_kind(stays_masked, editable);
  }
};

// By one warp; the result is on every lane
__device__ __forceinline__ Place place_of(const SpdArgs& args, int64_t index) {
  const auto batch_row =
      static_cast<int64_t>(static_cast<unsigned>(index) / static_cast<unsigned>(args.block));
  const int64_t base = batch_row * args.block;
  const auto position = static_cast<int>(index - base);
  Place place{args.token[index], thresholds_of(args, batch_row).decode, args.masked[index],
              args.editable[index], true};
  bool before = false;
  for (int i = lane_id(); i < position; i += kWarpSize) before = before || args.masked[base + i];
  place.first = __ballot_sync(kFullMask, before) == 0;
  return place;
}

template <int kTokens, class Meeting>
__device__ __forceinline__ void predict(float scale, const RowSplit& split, const Meeting& meeting,
                                        const SpdArgs& args, int64_t index) {
  __shared__ Place place;
  __shared__ Listed top1;
  __shared__ Listed listed[kTokens];
  if (warp_id() == 0) {
    const SoftmaxStats stats = meeting.merged(scale).stats;
    if (lane_id() == 0) top1 = {top1_probability(stats), stats.id};
    if constexpr (kTokens > 1) {
      const TopList list = merge_lists(split, args.lists, index, args.top_k);
      if (lane_id() < args.top_k) {
        const Listed mine{listed_probability(list.mine, stats, scale), id_of(list.mine)};
        listed[lane_id()] = mine;
        args.listed[index * args.top_k + lane_id()] = mine;
      }
    }
  } else if (warp_id() == 1) {
    const Place found = place_of(args, index);
    if (lane_id() == 0) place = found;
  }
  __syncthreads();

  // The authors' loop leaves the embeddings of its last step alone: there phase 3 has to decide
  int written = -1;
  if (args.semantics != Semantics::kReleased) {
    const Embedding kind = place.likely_embedding(top1.confidence);
    Listed mine = top1;
    if constexpr (kTokens > 1) {
      if (lane_id() < args.top_k) mine = listed[lane_id()];
    }
    const int64_t token = kind == Embedding::kToken ? place.token : mine.token;
    if constexpr (kTokens == 1) {
      write_position<1, BlockTeam>(args, kind, token, mine.confidence, index);
    } else if (warp_id() == 0) {  // for a block, the code of all kinds of mixes would double
      write_position<kTokens, WarpTeam>(args, kind, token, mine.confidence, index);
    }
    written = static_cast<int>(kind);
  }
  if (threadIdx.x == 0) args.predictions[index] = {top1.confidence, top1.token, written, 0};
}

// ---- Phase 3, by one block ----

__device__ __forceinline__ int block_min(int value) {
  __shared__ int of_warps[kClusterRowWarps];
  const int mine = warp_first(value);
  if (lane_id() == 0) of_warps[warp_id()] = mine;
  __syncthreads();
  int least = of_warps[0];
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int w = 1; w < warps; ++w) least = min(least, of_warps[w]);
  __syncthreads();  // before the next call writes
  return least;
}

// One position's prediction and state, as phase 3 finds them
struct Found {
  Prediction predicted;
  int64_t token;
  bool masked, editable;
};

__device__ __forceinline__ Found found_at(const SpdArgs& args, int64_t index) {
  return {load_other_block(args.predictions + index), args.token[index], args.masked[index],
          args.editable[index]};
}

// What is left to do for the embedding of a position: nothing if kind is -1
struct Rewrite {
  int64_t token;
  float probability;
  int32_t kind;
};

// Lines 5-12 for one batch row, by all threads of the block. Each thread loads its position once,
// and once more only in rows longer than a block.
struct StateUpdate {
  const SpdArgs& args;
  int64_t base;  // index of the row's first position
  Found mine;    // position threadIdx.x, where there is one
  bool released;
  int first_masked;  // where the promoted run begins,
  int first_failed;  // and what ends it
  bool converged;
  bool any_editable;

  __device__ __forceinline__ Found at(int i) const {
    return i == static_cast<int>(threadIdx.x) ? mine : found_at(args, base + i);
  }
  __device__ __forceinline__ bool promoted(int i, const Found& here) const {
    return is_promoted(i, here.masked, first_masked, first_failed);
  }
  // Whether the position takes its prediction
  __device__ __forceinline__ bool takes(int i, const Found& here) const {
    return released ? promoted(i, here) || (here.editable && !here.masked) : here.editable;
  }
  __device__ __forceinline__ int64_t new_token(int i, const Found& here) const {
    return takes(i, here) ? here.predicted.token : here.token;
  }
  __device__ __forceinline__ bool new_masked(int i, const Found& here) const {
    return released ? here.editable && new_token(i, here) == args.table.mask_token_id
                    : here.masked && !promoted(i, here) && !converged;
  }

  __device__ __forceinline__ StateUpdate(const SpdArgs& args_, int64_t batch_row)
      : args(args_), base(batch_row * args_.block), mine{} {
    const Thresholds tau = thresholds_of(args, batch_row);
    const auto thread = static_cast<int>(threadIdx.x);
    const int step = args.step[batch_row];
    released = args.semantics == Semantics::kReleased;
    const bool settled = args.semantics == Semantics::kSettled;
    if (thread < args.block) mine = found_at(args, base + thread);

    first_masked = first_failed = args.block;
    bool sure = true;
    bool same = true;
    bool editable = false;
    for (int i = thread; i < args.block; i += static_cast<int>(blockDim.x)) {
      const Found here = at(i);
      const float confidence = here.predicted.confidence;
      if (here.masked) {
        first_masked = min(first_masked, i);
        if (!passes(confidence, tau.decode, released)) first_failed = min(first_failed, i);
      }
      if (here.editable) {
        editable = true;
        sure = sure && passes(confidence, tau.accept, released);
        // Settled: a prediction at a masked position is no decision yet, even if it repeats
        same = same && !(settled && here.masked) && here.predicted.token == here.token;
      }
    }
    first_masked = block_min(first_masked);
    first_failed = block_min(first_failed);
    const bool confident = __syncthreads_and(sure) != 0;
    any_editable = __syncthreads_or(editable) != 0;
    bool consistent;
    if (released) {  // no updated position changes
      bool changed = false;
      for (int i = thread; i < args.block; i += static_cast<int>(blockDim.x)) {
        const Found here = at(i);
        changed = changed || (takes(i, here) && here.predicted.token != here.token);
      }
      consistent = __syncthreads_or(changed) == 0;
    } else {
      consistent = __syncthreads_and(same) != 0 && step >= 1;
    }
    converged = confident || consistent;  // a row with nothing to decode is confident
    if (thread == 0) {
      args.step[batch_row] = step + 1;
      if (converged) args.converged[batch_row] = true;
    }
  }

  // Stores the new state of position i. No barrier comes before it: a thread reads and writes its
  // own positions only.
  __device__ __forceinline__ Rewrite store(int i) const {
    const Found here = at(i);
    const int64_t token = new_token(i, here);
    const bool masked = new_masked(i, here);
    args.token[base + i] = token;
    if (here.editable) args.confidence[base + i] = here.predicted.confidence;
    args.masked[base + i] = masked;

    // The authors' loop leaves the embeddings of its last step alone, unless there was nothing to
    // decode and this was the only step
    if (released && converged && any_editable) return {0, 0.0f, -1};
    const Embedding kind = embedding_kind(masked, here.editable);
    const auto number = static_cast<int32_t>(kind);
    return {kind == Embedding::kToken ? token : here.predicted.token, here.predicted.confidence,
            number == here.predicted.written ? -1 : number};
  }
};

// The new state, and the embeddings that phase 2 did not write or guessed wrong: one warp each
template <int kTokens>
__device__ __forceinline__ void finish_row(const SpdArgs& args, int64_t batch_row) {
  __shared__ Rewrite rewrites[kRowThreads];
  const StateUpdate update(args, batch_row);
  for (int begin = 0; begin < args.block; begin += kRowThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kRowThreads)
      rewrites[threadIdx.x] = i < args.block ? update.store(i) : Rewrite{0, 0.0f, -1};
    __syncthreads();
    for (int place = warp_id(); place < kRowThreads && begin + place < args.block;
         place += static_cast<int>(blockDim.x) / kWarpSize) {
      const Rewrite rewrite = rewrites[place];
      if (rewrite.kind < 0) continue;
      const int64_t index = update.base + begin + place;
      int64_t token = rewrite.token;
      float probability = rewrite.probability;
      if constexpr (kTokens > 1) {
        if (rewrite.kind != static_cast<int32_t>(Embedding::kToken) && lane_id() < args.top_k) {
          const uint64_t bits = load_other_block_8(
              reinterpret_cast<const uint64_t*>(args.listed + index * args.top_k + lane_id()));
          probability = __uint_as_float(static_cast<uint32_t>(bits));
          token = static_cast<int32_t>(bits >> 32);
        }
      }
      write_position<kTokens, WarpTeam>(args, static_cast<Embedding>(rewrite.kind), token,
                                        probability, index);
    }
    __syncthreads();  // before the next positions take the places
  }
}

}  // namespace dmax::cuda
