// oput_loss_and_grad_: the loss of every row, and the row overwritten with its gradient.
//
// From sm_90 on, a cluster of blocks holds the row in its shared memory: each logit is read once
// and written once. On older GPUs, and for rows that no cluster can hold, one block reads the row
// twice. Both merge the tiles' statistics in the order of rows.cuh and therefore agree
// to the last bit.
#pragma once

#include "cuda/loss.cuh"

namespace dmax::cuda {

struct LossGrad {
  const float* scale[2];  // [rows] of each pass; null means 1

  __device__ __forceinline__ float of(int pass, int64_t row) const {
    const float* values = pass == 0 ? scale[0] : scale[1];
    return values == nullptr ? 1.0f : values[row];
  }
};

// What the gradient of a row needs once its statistics are known
template <class T>
__device__ __forceinline__ GradScale finish_row(const LossPartial& merged, float x_target,
                                                int64_t target, float grad, int vocab,
                                                const LossOptions<float>& options, RowLoss* loss) {
  *loss = row_loss(merged, x_target, vocab, options);
  return grad_scale(grad, merged.max, 1.0f + merged.rest, loss->logsumexp, target, vocab, options);
}

template <class T>
__device__ __forceinline__ void zero_tiles(T* row, int vocab, int begin, int end) {
  const bool aligned = aligned_16(row);
  for (int t = begin + warp_id(); t < end; t += kRowWarps) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      store_vector(row, aligned, vocab, t * kTileSize<T> + (v * kWarpSize + lane_id()) * kWidth<T>,
                   uint4{0, 0, 0, 0});
  }
}

constexpr int kLossAndGradResident = 3;  // blocks per multiprocessor: 80 registers a thread

// ---- One read, one write: a cluster per row ----

// Dynamic shared memory holds the slice's tiles as they are in memory, then their partial results
template <class T, bool kMean>
__global__ void __launch_bounds__(kRowThreads, kLossAndGradResident)
    loss_and_grad_cluster_kernel(const __grid_constant__ LossRows<T> rows, int tiles, int cluster,
                                 int slice_tiles, const __grid_constant__ Targets targets,
                                 const __grid_constant__ LossOptions<float> options,
                                 const __grid_constant__ LossGrad grad,
                                 const __grid_constant__ LossOutput out) {
  const int64_t index = blockIdx.x / static_cast<unsigned>(cluster);
  const int rank = static_cast<int>(cluster_rank());
  const int pass = rows.pass(index);
  const int64_t row_index = rows.row_in_pass(index);
  T* data = rows.data(index);
  const int begin = rank * slice_tiles;
  const int end = min(begin + slice_tiles, tiles);
  const int64_t target = targets.of(row_index);
  if (target == options.ignore_index) {  // the whole cluster leaves here, before its barriers
    zero_tiles(data, rows.vocab, begin, end);
    if (rank == 0 && threadIdx.x == 0) out.store(pass, row_index, {0.0f, 0.0f});
    return;
  }

  const float upstream = grad.of(pass, row_index);  // on its way long before it is needed

  // Read the slice into shared memory, with each tile's statistics
  constexpr int kTileVectors = kVectors * kWarpSize;
  uint4* slice = dynamic_shared;
  auto* partials = reinterpret_cast<LossPartial*>(dynamic_shared + slice_tiles * kTileVectors);
  const Row<T> row = make_row<T>(data, rows.vocab);
  __shared__ float x_target;
  if (threadIdx.x == 0) x_target = target_logit(row, target);  // before a block overwrites it
  for (int t = begin + warp_id(); t < end; t += kRowWarps) {
    Tile<T> tile;
    load_tile<T, Access::kReadFirst>(tile, row, t, -1);
    uint4* kept = slice + (t - begin) * kTileVectors + lane_id();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) kept[v * kWarpSize] = tile.raw[v];
    const LossPartial partial = loss_tile<T, kMean>(tile, row);
    if (lane_id() == 0) partials[t - begin] = partial;
  }
  cluster_sync();

  // Every block merges the row's statistics from all slices
  __shared__ LossPartial of_row;
  if (warp_id() == 0) {
    LossPartial merged = LossPartial::empty();
    for (int t = lane_id(); t < tiles; t += kWarpSize) {
      const auto owner = static_cast<unsigned>(t) / static_cast<unsigned>(slice_tiles);
      const unsigned place = t - owner * static_cast<unsigned>(slice_tiles);
      merged = LossPartial::merge(merged, in_cluster_rank(partials, owner)[place], kLog2E);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      merged = LossPartial::merge(merged, merged.shuffle_xor(lanes), kLog2E);
    if (lane_id() == 0) of_row = merged;
  }
  // No block overwrites its slice before all have read the target's logit, and none leaves while
  // another reads its partial results
  cluster_sync();

  // Overwrite the slice with its gradient
  RowLoss loss;
  const GradScale scale =
      finish_row<T>(of_row, x_target, target, upstream, rows.vocab, options, &loss);
  if (rank == 0 && threadIdx.x == 0) out.store(pass, row_index, loss);
  for (int t = begin + warp_id(); t < end; t += kRowWarps) {
    const uint4* kept = slice + (t - begin) * kTileVectors + lane_id();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = t * kTileSize<T> + (v * kWarpSize + lane_id()) * kWidth<T>;
      store_vector(data, row.aligned, rows.vocab, first,
                   grad_vector<T>(scale, kept[v * kWarpSize], first));
    }
  }
}

// ---- Two reads, one write: one block per row ----

template <class T, bool kMean>
__global__ void __launch_bounds__(kRowThreads, kLossAndGradResident)
    loss_and_grad_two_pass_kernel(const __grid_constant__ LossRows<T> rows, int tiles,
                                  const __grid_constant__ Targets targets,
                                  const __grid_constant__ LossOptions<float> options,
                                  const __grid_constant__ LossGrad grad,
                                  const __grid_constant__ LossOutput out) {
  const int64_t index = blockIdx.x;
  const int pass = rows.pass(index);
  const int64_t row_index = rows.row_in_pass(index);
  T* data = rows.data(index);
  const int64_t target = targets.of(row_index);
  if (target == options.ignore_index) {
    zero_tiles(data, rows.vocab, 0, tiles);
    if (threadIdx.x == 0) out.store(pass, row_index, {0.0f, 0.0f});
    return;
  }

  const float upstream = grad.of(pass, row_index);

  // The row's statistics
  const RowSplit whole = make_row_split(tiles, 1);
  const Row<T> row = make_row<T>(data, rows.vocab);
  for (int t = warp_id(); t < tiles; t += kRowWarps) {
    Tile<T> tile;
    load_tile<T, Access::kReadFirst>(tile, row, t, -1);
    const LossPartial partial = loss_tile<T, kMean>(tile, row);
    if (lane_id() == 0) *partial_of<LossPartial>(whole, index, t) = partial;
  }
  __shared__ LossPartial of_row;
  __shared__ float x_target;
  __syncthreads();
  if (warp_id() == 0) {
    const LossPartial merged = merge_row<LossPartial>(whole, index, kLog2E);
    if (lane_id() == 0) {
      of_row = merged;
      x_target = target_logit(row, target);  // before a warp overwrites it
    }
  }
  __syncthreads();

  // The row's gradient
  RowLoss loss;
  const GradScale scale =
      finish_row<T>(of_row, x_target, target, upstream, rows.vocab, options, &loss);
  if (threadIdx.x == 0) out.store(pass, row_index, loss);
  for (int t = warp_id(); t < tiles; t += kRowWarps) {
    Tile<T> tile;
    load_tile<T, Access::kInterleaved>(tile, row, t, -1);
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      store_vector(data, row.aligned, rows.vocab, tile.id(v, 0),
                   grad_vector<T>(scale, tile.raw[v], tile.id(v, 0)));
  }
}

// ---- Host side ----

struct LossAndGradLaunch {
  int tiles;
  int cluster;      // blocks per row; 0: the two-pass kernel
  int slice_tiles;  // tiles of a row that one block holds
  LaunchShape shape;
};

// Chosen by arithmetic, not yet measured: the smallest cluster whose slices let three blocks share
// a multiprocessor's 228 KB, so that one loads while another waits at the cluster's barrier; or
// else the largest cluster, provided that a slice fits into a block at all. 8 is the largest
// cluster that every sm_90 GPU starts without asking.
template <class T>
LossAndGradLaunch choose_loss_and_grad_launch(int64_t rows_of_all_passes, int64_t vocab,
                                              const Device& device) {
  constexpr int kComfortable = 72 * 1024;
  constexpr int kTileBytes = kVectors * kWarpSize * 16;
  LossAndGradLaunch launch{};
  launch.tiles = static_cast<int>((vocab + kTileSize<T> - 1) / kTileSize<T>);
  const auto rows = static_cast<unsigned>(rows_of_all_passes);
  for (int cluster = 1; device.major >= 9 && cluster <= 8; cluster *= 2) {
    const int slice_tiles = (launch.tiles + cluster - 1) / cluster;
    const int bytes = slice_tiles * (kTileBytes + static_cast<int>(sizeof(LossPartial)));
    const int most = device.max_shared_per_block - 1024;  // beside the static shared memory
    if (bytes > most || (bytes > kComfortable && cluster < 8)) continue;
    launch.cluster = cluster;
    launch.slice_tiles = slice_tiles;
    launch.shape = {rows * static_cast<unsigned>(cluster), kRowThreads, static_cast<size_t>(bytes),
                    static_cast<unsigned>(cluster)};
    return launch;
  }
  launch.shape = {rows, kRowThreads, launch.tiles * sizeof(LossPartial)};
  return launch;
}

template <class T>
auto launch_loss_and_grad(const LossAndGradLaunch& chosen, const LossRows<T>& rows,
                          const Targets& targets, const LossOptions<float>& options,
                          const LossGrad& grad, const LossOutput& out, Stream stream) {
  const bool mean = options.label_smoothing != 0.0f;
  if (chosen.cluster == 0) {
    const auto kernel =
        mean ? loss_and_grad_two_pass_kernel<T, true> : loss_and_grad_two_pass_kernel<T, false>;
    return launch(chosen.shape, stream, kernel, rows, chosen.tiles, targets, options, grad, out);
  }
  const auto kernel =
      mean ? loss_and_grad_cluster_kernel<T, true> : loss_and_grad_cluster_kernel<T, false>;
  return launch(chosen.shape, stream, kernel, rows, chosen.tiles, chosen.cluster,
                chosen.slice_tiles, targets, options, grad, out);
}

}  // namespace dmax::cuda
