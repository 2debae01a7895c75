// A sample of every row in one read, for a whole vocabulary and for one shard of it.
//
// The draw has two levels, both Gumbel-max: a draw tile of 64 ids by the log of its mass, then an
// id in that tile by its logit. The largest of some perturbed logits is distributed as the log of
// their mass plus one Gumbel variable, so the law is that of perturbing every logit, for one noise
// per 64 ids. The ids of the winning tile are read again.
#pragma once

#include "cuda/draw_tiles.cuh"
#include "cuda/rows.cuh"

namespace dmax::cuda {

struct SampleKey {
  const int64_t* seed;  // [2], or [rows, 2]
  bool seed_per_row;
  float inverse_temperature;
  uint32_t first_id;  // of the row's first element, a multiple of kDrawTile

  __device__ __forceinline__ NoiseStream noise(int64_t row) const {
    return noise_stream(seed + (seed_per_row ? 2 * row : 0), seed_per_row ? 0 : row);
  }
};

// The best perturbed score and its place: a draw tile of the row, or an id
struct Scored {
  float score;
  int place;

  // Places come in rising order, so that the first of equal scores stays
  __device__ __forceinline__ void offer(float other, int at) {
    if (other > score) *this = {other, at};
  }
};

__device__ __forceinline__ Scored better(const Scored& a, const Scored& b) {
  const bool a_wins = a.score > b.score || (a.score == b.score && a.place < b.place);
  return {a_wins ? a.score : b.score, a_wins ? a.place : b.place};
}

__device__ __forceinline__ Scored warp_best(const Scored& mine) {
  const float score = warp_max(mine.score);
  const int place = mine.score == score ? mine.place : kNoId;
  return {score, static_cast<int>(__reduce_min_sync(kFullMask, static_cast<uint32_t>(place)))};
}

// A tile's partial result, and a row's
struct alignas(16) SamplePartial {
  float max;
  float rest;   // SoftmaxStats::rest
  float score;  // of the best draw tile
  int place;    // that draw tile; of a broken part, the id of its first NaN or +inf

  // There is a NaN or +inf
  __device__ __forceinline__ bool broken() const { return !(max < INFINITY); }
  // Nothing but -inf
  __device__ __forceinline__ bool no_mass() const { return max == -INFINITY; }
  __device__ __forceinline__ bool defined() const { return is_finite(max); }

  static __device__ __forceinline__ SamplePartial empty() {
    return {-INFINITY, 0.0f, -INFINITY, kNoId};
  }
  static __device__ __forceinline__ SamplePartial merge(const SamplePartial& a,
                                                        const SamplePartial& b, float scale) {
    const SoftmaxStats stats =
        merge_stats(SoftmaxStats{a.max, a.rest, a.place}, SoftmaxStats{b.max, b.rest, b.place},
                    [=](float d) { return exp2_approx(d * scale); });
    const Scored best = better({a.score, a.place}, {b.score, b.place});
    const bool broken = !(stats.max < INFINITY);
    return {stats.max, stats.rest, best.score, broken ? stats.id : best.place};
  }
  __device__ __forceinline__ SamplePartial shuffle_xor(int lanes) const {
    return {__shfl_xor_sync(kFullMask, max, lanes), __shfl_xor_sync(kFullMask, rest, lanes),
            __shfl_xor_sync(kFullMask, score, lanes), __shfl_xor_sync(kFullMask, place, lanes)};
  }
};

// The score of this lane's draw tile, `index` in its row
__device__ __forceinline__ float tile_score(float log_mass, int index, const NoiseStream& noise,
                                            uint32_t first_id) {
  const uint32_t place = kTileCounters + first_id / kDrawTile + static_cast<uint32_t>(index);
  return log_mass + gumbel(noise.word(place));
}

struct Drawn {
  int id;
  float logit;
};

// The sample among the ids of draw tile `index` for which visible(id, x), by one warp
template <class T, class Visible>
__device__ __forceinline__ Drawn draw_in_tile(const Row<T>& row, int index,
                                              const NoiseStream& noise, uint32_t first_id,
                                              float inverse_temperature, const Visible& visible) {
  constexpr int kEach = kDrawTile / kWarpSize;
  const int first = index * kDrawTile + lane_id() * kEach;
  const uint32_t place = first_id + static_cast<uint32_t>(first);
  const Words words = noise.words(place >> 2);
  Scored best{-INFINITY, kNoId};
  float logit = -INFINITY;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int id = first + i;
    if (id >= row.vocab) break;
    const float x = to_float(row.data[id]);
    if (!visible(id, x)) continue;
    // One rounding, spelled out, for the same bits in every kernel
    const float score = fmaf(x, inverse_temperature, gumbel(word_of(words, (place & 3) + i)));
    if (score > best.score) logit = x;
    best.offer(score, id);
  }
  const int id = warp_best(best).place;
  return {id, warp_max(best.place == id ? logit : -INFINITY)};
}

// What an op makes of a row: `drawn` is the sample, or in a row without one the token to report
struct SampledRow {
  SamplePartial part;
  Drawn drawn;

  // exp((logit - max) / temperature)
  __device__ __forceinline__ float weight(float scale) const {
    return exp2_approx((drawn.logit - part.max) * scale);
  }
};

constexpr int kSampleResident = 3;         // blocks per multiprocessor: 80 registers a thread
constexpr int kSampleClusterResident = 2;  // 96 registers

// finish(row, sampled, scale) stores what the op makes of a row's sample; one thread calls it
template <class T, class Finish, bool kCluster>
__global__ void __launch_bounds__(kBlockThreads<kCluster>,
                                  kCluster ? kSampleClusterResident : kSampleResident)
    sample_rows_kernel(const __grid_constant__ LogitsView<T> logits,
                       const __grid_constant__ RowSplit split,
                       const __grid_constant__ SampleKey key,
                       const __grid_constant__ Finish finish) {
  const TileRange range = block_tiles<kCluster>(split);
  RowMeeting<SamplePartial, kCluster> meeting(split, range.row);
  const NoiseStream noise = key.noise(range.row);
  const Row<T> row = logits.row(range.row);

  Scored best{-INFINITY, kNoId};  // of this lane's draw tiles
  float to_beat = -INFINITY;      // the warp's best score
  for (int t = range.begin + warp_id(); t < range.end; t += kBlockWarps<kCluster>) {
    Tile<T> tile;
    load_tile(tile, row, t, logits.suppress);
    const DrawTile mine = reduce_draw_tile(tile, logits.scale);

    // The tile's statistics
    SoftmaxStats stats{warp_max(mine.max), 0.0f, kNoId};
    const float weight = exp2_approx((mine.max - finite_reference(stats.max)) * logits.scale);
    stats.rest = warp_sum(counts<T>() ? mine.sum * weight : 0.0f) - 1.0f;
    const bool broken = stats.rest != stats.rest;
    if (broken) find_broken(tile, row, logits.suppress, &stats);

    // No noise where none could make a draw tile win
    const float mass = log_mass(mine, key.inverse_temperature);
    if (__ballot_sync(kFullMask, mass + kLargestNoise > to_beat) != 0) {
      const int index = t * kDrawTiles<T> + own_draw_tile<T>();
      best.offer(tile_score(mass, index, noise, key.first_id), index);
      to_beat = warp_max(best.score);
    }
    Scored of_warp{-INFINITY, kNoId};
    if (t + kBlockWarps<kCluster> >= range.end) of_warp = warp_best(best);
    meeting.put(t, {stats.max, stats.rest, of_warp.score, broken ? stats.id : of_warp.place});
  }
  if (!meeting.gather() || warp_id() != 0) return;

  SampledRow sampled{meeting.merged(logits.scale), {0, 0.0f}};
  if (sampled.part.defined()) {
    sampled.drawn =
        draw_in_tile(row, sampled.part.place, noise, key.first_id, key.inverse_temperature,
                     [&](int id, float) { return id != logits.suppress; });
  } else if (sampled.part.broken()) {
    sampled.drawn.id = sampled.part.place;
  }
  if (lane_id() == 0) finish(range.row, sampled, logits.scale);
}

template <class T, class Finish>
auto launch_sample_rows(const RowLaunch& run, const LogitsView<T>& logits, const SampleKey& key,
                        const Finish& finish, Stream stream) {
  const auto kernel =
      run.cluster() ? sample_rows_kernel<T, Finish, true> : sample_rows_kernel<T, Finish, false>;
  return launch(run.shape, stream, kernel, logits, run.split, key, finish);
}

inline RowWork sample_work(int64_t rows, int64_t vocab) {
  return {rows, vocab, kSampleResident, 0, true};
}

// The results of sample_tokens, one per row
struct SampleResults {
  int64_t* token;
  float* probability;
  float* top1_probability;
  float* relative_confidence;

  __device__ __forceinline__ void store(int64_t row, int id, float of_token, float of_top1,
                                        float relative) const {
    token[row] = id;
    probability[row] = of_token;
    top1_probability[row] = of_top1;
    relative_confidence[row] = relative;
  }
  __device__ __forceinline__ void store_undefined(int64_t row, int id) const {
    store(row, id, NAN, NAN, NAN);
  }
};

struct SampleTokensFinish {
  SampleResults results;

  __device__ __forceinline__ void operator()(int64_t row, const SampledRow& sampled,
                                             float scale) const {
    if (!sampled.part.defined()) return results.store_undefined(row, sampled.drawn.id);
    const float weight = sampled.weight(scale);
    const float top1 = 1.0f / (1.0f + sampled.part.rest);
    results.store(row, sampled.drawn.id, weight / (1.0f + sampled.part.rest), top1,
                  fminf(top1, weight));
  }
};

// At temperature 0: the top-1 of every row, for top1_rows_kernel
struct GreedyFinish {
  SampleResults results;

  __device__ __forceinline__ void operator()(int64_t row, const SoftmaxStats& stats) const {
    const float confidence = top1_probability(stats);
    results.store(row, stats.id, confidence, confidence, confidence);
  }
};

// One vocabulary shard's part of the race, and of the softmax beside it
struct SamplePartialFinish {
  float* maximum;
  float* sum_exp;
  int64_t* token;
  float* score;
  float* weight;
  int64_t vocab_start;

  __device__ __forceinline__ void operator()(int64_t row, const SampledRow& sampled,
                                             float scale) const {
    const SamplePartial& part = sampled.part;
    const float undefined = part.no_mass() ? 0.0f : NAN;
    maximum[row] = part.max;
    sum_exp[row] = part.defined() ? 1.0f + part.rest : undefined;
    token[row] = vocab_start + sampled.drawn.id;
    score[row] = part.defined() ? part.score : part.max;
    weight[row] = part.defined() ? sampled.weight(scale) : undefined;
  }
};

}  // namespace dmax::cuda
