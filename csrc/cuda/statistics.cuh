// row_statistics: top-1, runner-up, entropy and logsumexp of every row, in one read.
//
// With t = (x - max) * scale in powers of two and w = 2^t, the entropy is
// log(sum w) - log(2) * sum(t w) / sum(w). No t is positive, hence nothing cancels. The winner's
// own term is 0, which leaves the small entropy of a sure row its digits beside log1p(rest).
#pragma once

#include "common/draw_options.h"
#include "cuda/rows.cuh"

namespace dmax::cuda {

// Below this, 2^t underflows to 0. Clamping t here makes t * 2^t 0 as well, instead of
// -inf * 0 = NaN.
constexpr float kLeastExponent = -150.0f;

struct alignas(16) StatisticsPartial {
  SoftmaxStats stats;
  float second;    // the largest logit, the one at stats.id left out
  float exponent;  // sum of t w, relative to stats.max
  int32_t unused[3];

  static __device__ __forceinline__ StatisticsPartial empty() {
    return {empty_stats(), -INFINITY, 0.0f, {0, 0, 0}};
  }
  // Symmetric in a and b to the last bit
  static __device__ __forceinline__ StatisticsPartial merge(const StatisticsPartial& a,
                                                            const StatisticsPartial& b,
                                                            float scale) {
    const bool a_first = ranks_before(a.stats.max, a.stats.id, b.stats.max, b.stats.id);
    const float top_exponent = a_first ? a.exponent : b.exponent;
    const float low_exponent = a_first ? b.exponent : a.exponent;
    const float low_max = a_first ? b.stats.max : a.stats.max;
    const float low_rest = a_first ? b.stats.rest : a.stats.rest;
    const float shift = (low_max - (a_first ? a.stats.max : b.stats.max)) * scale;
    const float weight = low_max == -INFINITY ? 0.0f : exp2_approx(shift);
    // Relative to the larger maximum, every t of the lower part is smaller by the shift
    const float shifted = fmaf(fmaxf(shift, kLeastExponent), 1.0f + low_rest, low_exponent);
    return {merge_stats(a.stats, b.stats, [=](float d) { return exp2_approx(d * scale); }),
            fmaxf(low_max, a_first ? a.second : b.second),
            fmaf(shifted, weight, top_exponent),
            {0, 0, 0}};
  }
  __device__ __forceinline__ StatisticsPartial shuffle_xor(int lanes) const {
    return {{__shfl_xor_sync(kFullMask, stats.max, lanes),
             __shfl_xor_sync(kFullMask, stats.rest, lanes),
             __shfl_xor_sync(kFullMask, stats.id, lanes)},
            __shfl_xor_sync(kFullMask, second, lanes),
            __shfl_xor_sync(kFullMask, exponent, lanes),
            {0, 0, 0}};
  }
};

// This lane's largest element, the one at `id` left out
template <class T>
__device__ __forceinline__ float lane_second(const Tile<T>& tile, const VectorMaxima<T>& maxima,
                                             int id) {
  float second = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int place = id - tile.id(v, 0);
    if (place >= 0 && place < kWidth<T>) {
#pragma unroll
      for (int e = 0; e < kWidth<T>; ++e)
        if (e != place) second = fmaxf(second, tile.at(v, e));
    } else {
      second = fmaxf(second, maxima.of[v]);
    }
  }
  return second;
}

template <class T, class Hidden>
__device__ __forceinline__ StatisticsPartial statistics_of_tile(const Tile<T>& tile,
                                                                const Row<T>& row,
                                                                const Hidden& hidden, float scale) {
  const VectorMaxima<T> maxima = vector_maxima(tile);
  StatisticsPartial partial = StatisticsPartial::empty();
  const float max = warp_max(maxima.lane);
  const Exponent exponent = exponent_from(finite_reference(max), scale);
  float exponents[2] = {0.0f, 0.0f};
  const TileSums sums =
      tile_sums(tile, maxima, max, exponent, [&](int /*v*/, int e, float t, float weight) {
        exponents[e % 2] = fmaf(fmaxf(t, kLeastExponent), weight, exponents[e % 2]);
      });
  partial.stats = tile_stats(tile, row, hidden, max, exponent, sums);
  // The sum of (t + correction) w, where w lacks the factor
  partial.exponent = fmaf(exponent.correction, sums.below, warp_sum(exponents[0] + exponents[1])) *
                     exponent.factor();
  partial.second = warp_max(lane_second(tile, maxima, partial.stats.id));
  return partial;
}

// What the kernel takes of a row's temperature
struct OneTemperature {
  float scale_;  // log2(e) / temperature
  double inverse_;

  __device__ __forceinline__ OneTemperature of_row(int64_t /*row*/) const { return *this; }
  __device__ __forceinline__ bool valid() const { return true; }
  __device__ __forceinline__ float scale() const { return scale_; }
  __device__ __forceinline__ double inverse() const { return inverse_; }
};

// With the same quotients as the host computes for one temperature, hence the same bits
struct RowTemperature {
  float temperature;

  __device__ __forceinline__ bool valid() const { return is_temperature(temperature); }
  __device__ __forceinline__ float scale() const {
    return softmax_scale(valid() ? static_cast<double>(temperature) : 1.0);
  }
  __device__ __forceinline__ double inverse() const { return 1.0 / temperature; }
};

struct RowTemperatures {
  const float* of_rows;  // [rows]

  __device__ __forceinline__ RowTemperature of_row(int64_t row) const { return {of_rows[row]}; }
};

struct RowStatisticsOutput {
  int64_t* token;
  float* confidence;
  float* runner_up;
  float* entropy;
  float* logsumexp;

  __device__ __forceinline__ void store(int64_t row, const StatisticsPartial& all, float scale,
                                        double inverse_temperature) const {
    const SoftmaxStats& stats = all.stats;
    const float top = top1_probability(stats);
    const bool broken = top != top;
    const float log_sum = log1pf(stats.rest);
    constexpr float kLog2 = 0.693147182f;
    token[row] = stats.id;
    confidence[row] = top;
    runner_up[row] = broken ? NAN : exp2_approx((all.second - stats.max) * scale) * top;
    entropy[row] = broken ? NAN : log_sum - kLog2 * all.exponent * top;
    // In double: the two parts may be large and cancel
    logsumexp[row] =
        broken ? stats.max
               : static_cast<float>(stats.max * inverse_temperature + static_cast<double>(log_sum));
  }
  // Of a row whose temperature is out of range
  __device__ __forceinline__ void store_undefined(int64_t row) const {
    token[row] = 0;
    confidence[row] = runner_up[row] = entropy[row] = logsumexp[row] = NAN;
  }
};

// Blocks per multiprocessor. Three leave a thread 80 registers; with a mask and a temperature per
// row ptxas spills at that on sm_80. Two leave it 128, and 96 in a cluster's larger blocks.
constexpr int statistics_resident(bool masked, bool per_row) { return masked && per_row ? 2 : 3; }
constexpr int kStatisticsClusterResident = 2;

template <class In, class Temperatures>
constexpr int kStatisticsResident =
    statistics_resident(kIsMasked<In>, std::is_same_v<Temperatures, RowTemperatures>);

template <class In, class Temperatures, bool kCluster>
__global__ void __launch_bounds__(kBlockThreads<kCluster>,
                                  kCluster ? kStatisticsClusterResident
                                           : kStatisticsResident<In, Temperatures>)
    row_statistics_kernel(const __grid_constant__ LogitsView<In> logits,
                          const __grid_constant__ RowSplit split,
                          const __grid_constant__ Temperatures temperatures,
                          const __grid_constant__ RowStatisticsOutput out) {
  const TileRange range = block_tiles<kCluster>(split);
  RowMeeting<StatisticsPartial, kCluster> meeting(split, range.row);
  using T = ElementOf<In>;
  const Row<T> row = logits.row(range.row);
  const auto hidden = logits.hidden(range.row);
  const auto temperature = temperatures.of_row(range.row);
  const float scale = temperature.scale();
  for (int t = range.begin + warp_id(); t < range.end; t += kBlockWarps<kCluster>) {
    Tile<T> tile;
    load_tile(tile, row, t, hidden);
    meeting.put(t, statistics_of_tile(tile, row, hidden, scale));
  }
  if (!meeting.gather() || warp_id() != 0) return;
  const StatisticsPartial all = meeting.merged(scale);
  if (lane_id() != 0) return;
  if (temperature.valid()) {
    out.store(range.row, all, scale, temperature.inverse());
  } else {
    out.store_undefined(range.row);
  }
}

template <class In, class Temperatures>
auto launch_with_temperatures(const RowLaunch& run, const LogitsView<In>& logits,
                              const Temperatures& temperatures, const RowStatisticsOutput& out,
                              Stream stream) {
  auto kernel = row_statistics_kernel<In, Temperatures, false>;
  if constexpr (!kIsMasked<In>) {
    if (run.cluster()) kernel = row_statistics_kernel<In, Temperatures, true>;
  }
  return launch(run.shape, stream, kernel, logits, run.split, temperatures, out);
}

// At the temperatures [rows] if there are any, else at this one
template <class In>
auto launch_row_statistics(const RowLaunch& run, const LogitsView<In>& logits, double temperature,
                           const float* temperatures, const RowStatisticsOutput& out,
                           Stream stream) {
  if (temperatures != nullptr)
    return launch_with_temperatures(run, logits, RowTemperatures{temperatures}, out, stream);
  const OneTemperature one{softmax_scale(temperature), 1.0 / temperature};
  return launch_with_temperatures(run, logits, one, out, stream);
}

inline RowWork statistics_work(int64_t rows, int64_t vocab, bool masked, bool per_row) {
  return {rows, vocab, statistics_resident(masked, per_row), 0, !masked};
}

}  // namespace dmax::cuda
