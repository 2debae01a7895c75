// The Gumbel-max sample of every row, in one read, for a whole vocabulary and for one shard of it.
//
// An element's noise is needed only if the element can win. With v uniform and
// E = -log1p(-v) >= v, an element x beats a score S only if v <= exp(x / T - S), and
// exp(x / T - max / T) is at hand for the softmax. Most elements therefore cost a Philox word and a
// comparison, and a vector whose best element even the smallest v cannot lift costs no word at all.
// The elements that remain are scored exactly; leaving out those that cannot win changes no bit.
#pragma once

#include "cuda/philox.cuh"
#include "cuda/rows.cuh"

namespace dmax::cuda {

struct Sample {
  float score;  // logit / temperature + Gumbel noise
  float logit;
  int32_t id;
};

__device__ __forceinline__ Sample better(const Sample& a, const Sample& b) {
  const bool a_wins = a.score > b.score || (a.score == b.score && a.id < b.id);
  return {a_wins ? a.score : b.score, a_wins ? a.logit : b.logit, a_wins ? a.id : b.id};
}

__device__ __forceinline__ Sample warp_best(Sample mine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    mine = better(mine, {__shfl_xor_sync(kFullMask, mine.score, lanes),
                         __shfl_xor_sync(kFullMask, mine.logit, lanes),
                         __shfl_xor_sync(kFullMask, mine.id, lanes)});
  return mine;
}

struct alignas(16) SamplePartial {
  SoftmaxStats stats;  // id is set only if max is NaN or +inf: then it is the row's token
  Sample sample;
  int32_t unused[2];

  // There is a NaN or +inf, and stats.id is the first one
  __device__ __forceinline__ bool broken() const { return !(stats.max < INFINITY); }
  // Nothing but -inf: no mass
  __device__ __forceinline__ bool no_mass() const { return stats.max == -INFINITY; }
  __device__ __forceinline__ int token() const {
    return broken() ? stats.id : no_mass() ? 0 : sample.id;
  }
  // exp((logit - max) / temperature)
  __device__ __forceinline__ float weight(float scale) const {
    return exp2_approx((sample.logit - stats.max) * scale);
  }

  static __device__ __forceinline__ SamplePartial empty() {
    return {empty_stats(), {-INFINITY, -INFINITY, kNoId}, {0, 0}};
  }
  static __device__ __forceinline__ SamplePartial merge(const SamplePartial& a,
                                                        const SamplePartial& b, float scale) {
    return {merge_stats(a.stats, b.stats, [=](float d) { return exp2_approx(d * scale); }),
            better(a.sample, b.sample),
            {0, 0}};
  }
  __device__ __forceinline__ SamplePartial shuffle_xor(int lanes) const {
    return {{__shfl_xor_sync(kFullMask, stats.max, lanes),
             __shfl_xor_sync(kFullMask, stats.rest, lanes),
             __shfl_xor_sync(kFullMask, stats.id, lanes)},
            {__shfl_xor_sync(kFullMask, sample.score, lanes),
             __shfl_xor_sync(kFullMask, sample.logit, lanes),
             __shfl_xor_sync(kFullMask, sample.id, lanes)},
            {0, 0}};
  }
};

struct SampleKey {
  const int64_t* seed;  // [2], or [rows, 2]
  bool seed_per_row;
  float inverse_temperature;
  uint32_t first_id;  // of the row's first element
};

__device__ __forceinline__ Sample score(float x, int id, uint32_t word, float inverse_temperature) {
  // One rounding, spelled out, for the same bits in every kernel
  return {fmaf(x, inverse_temperature, gumbel(word)), x, id};
}

// How large v may be for an element with exp((x - max) / T) = 1 to reach `best`; a little larger,
// so that no rounding of the comparison leaves out an element that would have won
__device__ __forceinline__ float reach(float max, float best, float inverse_temperature) {
  const float slack = 1e-3f + 1e-6f * fabsf(best);
  return exp2_approx((max * inverse_temperature - best + slack) * kLog2E);
}

// Returns the tile's SoftmaxStats::rest, and sets `best` to the best of its samples and `best`;
// both are the same on every lane
template <class T, FirstId kFirst>
__device__ __forceinline__ float sample_tile(const Tile<T>& tile, const Row<T>& row,
                                             const VectorMaxima<T>& maxima, float max,
                                             const NoiseStream<kFirst>& noise,
                                             const LogitsView<T>& logits, float inverse_temperature,
                                             Sample* best) {
  // A first score per lane, that of its largest element, to have something to beat
  const int first = lane_argmax(tile, maxima);
  Sample mine = *best;
  if (first < row.vocab) {
    mine = better(mine, score(maxima.lane, first, noise.word(first), inverse_temperature));
  }
  const float within = reach(max, warp_max(mine.score), inverse_temperature);

  // The sum of exponentials, and one bit per element that may beat that
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  uint32_t candidates[2] = {0, 0};
  const float reference = finite_reference(max);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const float vector_weight = exp2_approx((maxima.of[v] - reference) * logits.scale);
    const bool in_reach = !(vector_weight * within < 0x1p-34f);  // below the smallest v
#pragma unroll
    for (int group = 0; group < kWidth<T> / 4; ++group) {
      float weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[i] = exp2_approx((tile.at(v, group * 4 + i) - reference) * logits.scale);
        sums[i] += weights[i];
      }
      if (!in_reach) continue;
      const Words words = noise.words(static_cast<uint32_t>(tile.id(v, group * 4)) >> 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool beaten = one_plus_floor(word_of(words, i)) > fmaf(weights[i], within, 1.0f);
        const int bit = v * kWidth<T> + group * 4 + i;
        if (!beaten) candidates[bit / 32] |= 1u << (bit % 32);
      }
    }
  }

  // Few are left. They are read again and scored exactly.
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    uint32_t left = half == 0 ? candidates[0] : candidates[1];
    while (left != 0) {
      const int bit = half * 32 + __ffs(left) - 1;
      left &= left - 1;
      const int id = tile.id(bit / kWidth<T>, bit % kWidth<T>);
      if (id >= row.vocab || id == logits.suppress) continue;
      const float x = to_float(row.data[id]);
      mine = better(mine, score(x, id, noise.word(id), inverse_temperature));
    }
  }
  *best = warp_best(mine);
  return warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) - 1.0f;
}

constexpr int kSampleResident = 2;  // blocks per multiprocessor: 128 registers a thread

// finish(row, partial, scale) stores what the op makes of a row's sample; one thread calls it
template <class T, FirstId kFirst, class Finish>
__global__ void __launch_bounds__(kRowThreads, kSampleResident)
    sample_rows_kernel(const __grid_constant__ LogitsView<T> logits,
                       const __grid_constant__ RowSplit split,
                       const __grid_constant__ SampleKey key,
                       const __grid_constant__ Finish finish) {
  const TileRange range = block_tiles(split);
  const int64_t* pair = key.seed + (key.seed_per_row ? 2 * range.row : 0);
  const auto noise = noise_stream<kFirst>(pair, key.seed_per_row ? 0 : range.row, key.first_id);
  const Row<T> row = logits.row(range.row);

  // Every tile's statistics and best sample
  Sample best{-INFINITY, -INFINITY, kNoId};
  for (int t = range.begin + warp_id(); t < range.end; t += kRowWarps) {
    Tile<T> tile;
    load_tile(tile, row, t, logits.suppress);
    const VectorMaxima<T> maxima = vector_maxima(tile);
    SoftmaxStats stats{warp_max(maxima.lane), 0.0f, kNoId};
    stats.rest =
        sample_tile(tile, row, maxima, stats.max, noise, logits, key.inverse_temperature, &best);
    if (stats.rest != stats.rest) find_broken(tile, row, logits.suppress, &stats);
    if (lane_id() == 0) *partial_of<SamplePartial>(split, range.row, t) = {stats, best, {0, 0}};
  }
  if (!last_of_row(split, range.row) || warp_id() != 0) return;

  const SamplePartial merged = merge_row<SamplePartial>(split, range.row, logits.scale);
  if (lane_id() == 0) finish(range.row, merged, logits.scale);
}

struct SampleTokensFinish {
  int64_t* token;
  float* probability;

  __device__ __forceinline__ void operator()(int64_t row, const SamplePartial& partial,
                                             float scale) const {
    const bool defined = !partial.broken() && !partial.no_mass();
    token[row] = partial.token();
    probability[row] = defined ? partial.weight(scale) / (1.0f + partial.stats.rest) : NAN;
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

  __device__ __forceinline__ void operator()(int64_t row, const SamplePartial& partial,
                                             float scale) const {
    const float max = partial.stats.max;
    const bool defined = !partial.broken() && !partial.no_mass();
    const float undefined = partial.no_mass() ? 0.0f : NAN;
    maximum[row] = max;
    sum_exp[row] = defined ? 1.0f + partial.stats.rest : undefined;
    token[row] = vocab_start + partial.token();
    score[row] = defined ? partial.sample.score : max;
    weight[row] = defined ? partial.weight(scale) : undefined;
  }
};

// The kernel of sample_partial. A shard that begins at a multiple of 4 takes the words of one
// Philox counter for four ids; elsewhere they may lie in two.
template <class T>
auto sample_partial_kernel(int64_t vocab_start) {
  return vocab_start % 4 == 0 ? sample_rows_kernel<T, FirstId::kMultipleOf4, SamplePartialFinish>
                              : sample_rows_kernel<T, FirstId::kAny, SamplePartialFinish>;
}

}  // namespace dmax::cuda
