// oput_loss: per-token cross-entropy of both passes, and its gradient.
//
// Per row with target y, of x = logits / temperature: loss = (1 - s) (lse - x_y) + s (lse - mean x)
// + z lse^2. Every difference is taken from the row's maximum, (max - x_y) + log(1 + rest): lse -
// x_y would lose the digits of logits with a large common offset.
#pragma once

#include "cuda/rows.cuh"

namespace dmax::cuda {

struct LossOptions {
  int64_t ignore_index;
  float label_smoothing;
  float z_loss;
  float temperature;
  float inverse_temperature;
  float scale;  // log2(e) / temperature
};

inline LossOptions make_loss_options(int64_t ignore_index, double label_smoothing, double z_loss,
                                     double temperature) {
  return {ignore_index,
          static_cast<float>(label_smoothing),
          static_cast<float>(z_loss),
          static_cast<float>(temperature),
          static_cast<float>(1.0 / temperature),
          softmax_scale(temperature)};
}

struct alignas(16) LossPartial {
  float max;
  float rest;   // as SoftmaxStats::rest
  float below;  // sum of max - x
  float count;  // number of elements, to merge `below`

  static __device__ __forceinline__ LossPartial empty() { return {-INFINITY, 0.0f, 0.0f, 0.0f}; }
  // Symmetric in a and b to the last bit
  static __device__ __forceinline__ LossPartial merge(const LossPartial& a, const LossPartial& b,
                                                      float scale) {
    const bool a_first = a.max > b.max;
    const float max = a_first ? a.max : b.max;
    const float low = a_first ? b.max : a.max;
    const float low_rest = a_first ? b.rest : a.rest;
    const float low_count = a_first ? b.count : a.count;
    const float weight = low == -INFINITY ? 0.0f : exp2_approx((low - max) * scale);
    const float shift = low_count == 0.0f || low == max ? 0.0f : (max - low) * low_count;
    return {max, fmaf(low_rest, weight, a_first ? a.rest : b.rest) + weight,
            (a.below + b.below) + shift, a.count + b.count};
  }
  __device__ __forceinline__ LossPartial shuffle_xor(int lanes) const {
    return {__shfl_xor_sync(kFullMask, max, lanes), __shfl_xor_sync(kFullMask, rest, lanes),
            __shfl_xor_sync(kFullMask, below, lanes), __shfl_xor_sync(kFullMask, count, lanes)};
  }
};

// kMean: label smoothing needs the mean of the logits
template <class T, bool kMean>
__device__ __forceinline__ LossPartial loss_tile(const Tile<T>& tile, const Row<T>& row,
                                                 float scale) {
  LossPartial partial;
  const VectorMaxima<T> maxima = vector_maxima(tile);
  partial.max = warp_max(maxima.lane);
  const float reference = finite_reference(partial.max);
  float distances[2] = {0.0f, 0.0f};
  const Exponent exponent = exponent_from(reference, scale);
  const TileSums sums =
      tile_sums(tile, maxima, partial.max, exponent, [&](int v, int e, float /*t*/, float /*w*/) {
        if (kMean && tile.id(v, e) < row.vocab) distances[e % 2] -= tile.at(v, e) - reference;
      });
  partial.rest = sums.rest(exponent);
  partial.below = kMean ? warp_sum(distances[0] + distances[1]) : 0.0f;
  partial.count = static_cast<float>(min(kTileSize<T>, row.vocab - tile.begin));
  return partial;
}

struct Targets {
  const void* ids;  // [rows], int64 or int32
  bool wide;        // int64

  __device__ __forceinline__ int64_t of(int64_t row) const {
    return wide ? static_cast<const int64_t*>(ids)[row] : static_cast<const int32_t*>(ids)[row];
  }
};

struct RowLoss {
  float loss;
  float logsumexp;  // of the logits / temperature
};

// `x_target` is NaN if the target lies outside the vocabulary
__device__ __forceinline__ RowLoss row_loss(const LossPartial& row, float x_target, int vocab,
                                            const LossOptions& options) {
  if (row.max == INFINITY) return {NAN, NAN};  // as log_softmax
  const float log_sum = log1pf(row.rest);
  const float lse = fmaf(row.max, options.inverse_temperature, log_sum);
  float loss = fmaf(row.max - x_target, options.inverse_temperature, log_sum);
  const float s = options.label_smoothing;
  if (s != 0.0f) {
    const float mean_below = row.below / static_cast<float>(vocab) * options.inverse_temperature;
    loss = (1.0f - s) * loss + s * (mean_below + log_sum);
  }
  if (options.z_loss != 0.0f) loss += options.z_loss * lse * lse;
  return {x_target != x_target ? NAN : loss, lse};
}

template <class T>
__device__ __forceinline__ float target_logit(const Row<T>& row, int64_t target) {
  return target >= 0 && target < row.vocab ? to_float(row.data[target]) : NAN;
}

// d loss / d logits = g [(1 + 2 z lse) softmax - (1 - s) onehot - s / V] / temperature, softmax
// being 2^((logit - reference) * scale) / sum
struct GradScale {
  Exponent exponent;
  float weight;  // what the softmax is multiplied by, over what its exponential is divided by
  float uniform;
  float onehot;
  int target;
};

__device__ __forceinline__ GradScale grad_scale(float grad, float reference, float sum, float lse,
                                                int64_t target, int vocab,
                                                const LossOptions& options) {
  grad *= options.inverse_temperature;
  if (target < 0 || target >= vocab) grad = NAN;
  const float s = options.label_smoothing;
  const Exponent exponent = exponent_from(reference, options.scale);
  return {exponent, grad * (1.0f + 2.0f * options.z_loss * lse) * (exponent.factor() / sum),
          grad * s / static_cast<float>(vocab), grad * (1.0f - s), static_cast<int>(target)};
}

// This lane's vector at id `first` of a row of gradients
template <class T>
__device__ __forceinline__ void store_vector(T* row, bool aligned, int vocab, int first,
                                             const uint4& raw) {
  if (aligned && first + kWidth<T> <= vocab) {
    *reinterpret_cast<uint4*>(row + first) = raw;
    return;
  }
#pragma unroll
  for (int e = 0; e < kWidth<T>; ++e) {
    const uint32_t half = sizeof(T) == 4 ? 0 : word(raw, e / 2) >> (e % 2 * 16);
    if (first + e < vocab) store_bits(row + first + e, sizeof(T) == 4 ? word(raw, e) : half);
  }
}

// The gradients of one vector of logits
template <class T>
__device__ __forceinline__ uint4 grad_vector(const GradScale& scale, const uint4& raw, int first) {
  float grads[kWidth<T>];
#pragma unroll
  for (int e = 0; e < kWidth<T>; ++e)
    grads[e] =
        fmaf(scale.weight, exp2_approx(scale.exponent.of(element<T>(raw, e))), -scale.uniform);
  const int place = scale.target - first;
  if (place >= 0 && place < kWidth<T>) {  // one of the row's vectors
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e)
      if (e == place) grads[e] -= scale.onehot;
  }
  return pack<T>(grads);
}

// ---- Forward ----

// One or both passes over the same rows: index i of a launch is row i % rows of pass i / rows
template <class T>
struct LossRows {
  T* logits[2];
  int64_t row_stride[2];
  int64_t rows;  // of each pass
  int vocab;

  __device__ __forceinline__ int pass(int64_t index) const { return index >= rows ? 1 : 0; }
  __device__ __forceinline__ int64_t row_in_pass(int64_t index) const {
    return index >= rows ? index - rows : index;
  }
  __device__ __forceinline__ T* data(int64_t index) const {
    const int p = pass(index);
    const int64_t row = row_in_pass(index);
    return p == 0 ? logits[0] + row * row_stride[0] : logits[1] + row * row_stride[1];
  }
};

struct LossOutput {
  float* loss[2];
  float* logsumexp[2];  // null if it is not wanted

  __device__ __forceinline__ void store(int pass, int64_t row, const RowLoss& value) const {
    (pass == 0 ? loss[0] : loss[1])[row] = value.loss;
    float* lse = pass == 0 ? logsumexp[0] : logsumexp[1];
    if (lse != nullptr) lse[row] = value.logsumexp;
  }
};

// Blocks per multiprocessor: 80 registers a thread, or 64
template <bool kMean>
constexpr int kLossResident = kMean ? 3 : 4;

template <class T, bool kMean>
__global__ void __launch_bounds__(kRowThreads, kLossResident<kMean>)
    oput_loss_kernel(const __grid_constant__ LossRows<T> rows,
                     const __grid_constant__ RowSplit split,
                     const __grid_constant__ Targets targets,
                     const __grid_constant__ LossOptions options,
                     const __grid_constant__ LossOutput out) {
  const TileRange range = block_tiles(split);
  const int pass = rows.pass(range.row);
  const int64_t row_index = rows.row_in_pass(range.row);
  const int64_t target = targets.of(row_index);
  const bool ignored = target == options.ignore_index;
  if (ignored && range.begin == 0 && threadIdx.x == 0) out.store(pass, row_index, {0.0f, 0.0f});
  // With a block per row, other blocks hide the latency of the target, and no logit of an ignored
  // row is read. Where rows are split there are few blocks, and the first tile's loads do not wait.
  if (split.splits == 1 && ignored) return;
  const Row<T> row = make_row<T>(rows.data(range.row), rows.vocab);
  for (int t = range.begin + warp_id(); t < range.end; t += kRowWarps) {
    Tile<T> tile;
    load_tile(tile, row, t, -1);
    if (skipped_after_loads(tile, ignored)) break;
    const LossPartial partial = loss_tile<T, kMean>(tile, row, options.scale);
    if (lane_id() == 0) *partial_of<LossPartial>(split, range.row, t) = partial;
  }
  if (ignored || !last_of_row(split, range.row) || warp_id() != 0) return;
  const LossPartial merged = merge_row<LossPartial>(split, range.row, options.scale);
  if (lane_id() == 0)
    out.store(pass, row_index, row_loss(merged, target_logit(row, target), row.vocab, options));
}

inline int loss_resident(const LossOptions& options) {
  return options.label_smoothing == 0.0f ? kLossResident<false> : kLossResident<true>;
}

template <class T>
auto launch_oput_loss(const RowLaunch& run, const LossRows<T>& rows, const Targets& targets,
                      const LossOptions& options, const LossOutput& out, Stream stream) {
  const auto kernel =
      options.label_smoothing == 0.0f ? oput_loss_kernel<T, false> : oput_loss_kernel<T, true>;
  return launch(run.shape, stream, kernel, rows, run.split, targets, options, out);
}

// ---- Backward of one pass, from the saved logsumexp ----

struct LossBackwardInputs {
  const float* grad_loss;  // [rows]
  const float* logsumexp;  // [rows], of the logits / temperature
};

// Each block takes kRowWarps tiles of a row
template <class T>
__global__ void __launch_bounds__(kRowThreads, 4)
    oput_loss_backward_kernel(const T* logits, int64_t row_stride, int vocab, int row_blocks,
                              const __grid_constant__ Targets targets,
                              const __grid_constant__ LossOptions options,
                              const __grid_constant__ LossBackwardInputs inputs, T* grad_logits) {
  const int64_t row_index = blockIdx.x / static_cast<unsigned>(row_blocks);
  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(row_blocks));
  const int t = part * kRowWarps + warp_id();
  if (t >= (vocab + kTileSize<T> - 1) / kTileSize<T>) return;
  T* out = grad_logits + row_index * vocab;
  const bool out_aligned = aligned_16(out);
  const int64_t target = targets.of(row_index);
  const int first = t * kTileSize<T> + lane_id() * kWidth<T>;
  if (target == options.ignore_index) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      store_vector(out, out_aligned, vocab, first + v * kWarpSize * kWidth<T>, uint4{0, 0, 0, 0});
    return;
  }
  Tile<T> tile;
  load_tile(tile, make_row(logits + row_index * row_stride, vocab), t, -1);
  const float lse = inputs.logsumexp[row_index];
  const GradScale scale = grad_scale(inputs.grad_loss[row_index], lse * options.temperature, 1.0f,
                                     lse, target, vocab, options);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    store_vector(out, out_aligned, vocab, tile.id(v, 0),
                 grad_vector<T>(scale, tile.raw[v], tile.id(v, 0)));
}

template <class T>
int backward_blocks_per_row(int64_t vocab) {
  const int64_t block = int64_t{kTileSize<T>} * kRowWarps;
  return static_cast<int>((vocab + block - 1) / block);
}

template <class T>
auto launch_oput_loss_backward(const T* logits, int64_t row_stride, int64_t rows, int vocab,
                               const Targets& targets, const LossOptions& options,
                               const LossBackwardInputs& inputs, T* grad_logits, Stream stream) {
  const int row_blocks = backward_blocks_per_row<T>(vocab);
  const LaunchShape shape{static_cast<unsigned>(rows * row_blocks), kRowThreads, 0};
  return launch(shape, stream, oput_loss_backward_kernel<T>, logits, row_stride, vocab, row_blocks,
                targets, options, inputs, grad_logits);
}

}  // namespace dmax::cuda
