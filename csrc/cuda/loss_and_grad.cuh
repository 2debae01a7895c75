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
                                                const LossOptions& options, RowLoss* loss) {
  *loss = row_loss(merged, x_target, vocab, options);
  return grad_scale(grad, merged.max, 1.0f + merged.rest, loss->logsumexp, target, vocab, options);
}

template <class T>
__device__ __forceinline__ void zero_tiles(T* row, int vocab, int begin, int end, int warps) {
  const bool aligned = aligned_16(row);
  for (int t = begin + warp_id(); t < end; t += warps) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      store_vector(row, aligned, vocab, t * kTileSize<T> + (v * kWarpSize + lane_id()) * kWidth<T>,
                   uint4{0, 0, 0, 0});
  }
}

// ---- One read, one write: a cluster per row ----

// Block `rank` of a cluster holds this many tiles of the row, and the first blocks one more
struct Slices {
  int fewest;
  int with_one_more;

  __device__ __forceinline__ int begin(int rank) const {
    return rank * fewest + min(rank, with_one_more);
  }
  int most() const { return fewest + (with_one_more > 0 ? 1 : 0); }
};

constexpr int kLossClusterWarps = 10;  // at most

// Blocks of ten warps per multiprocessor: 64 registers a thread, or 96
template <bool kMean>
constexpr int kLossClusterResident = kMean ? 2 : 3;

// Dynamic shared memory holds the partial results of all of the row's tiles, then this block's
// tiles as they are in memory. Every warp hands a tile's partial result, and the target's logit, to
// all blocks of the cluster at once, so that behind the cluster's one barrier each merges what lies
// in its own memory and none needs another again.
template <class T, bool kMean>
__global__ void __launch_bounds__(kLossClusterWarps* kWarpSize, kLossClusterResident<kMean>)
    loss_and_grad_cluster_kernel(const __grid_constant__ LossRows<T> rows, int tiles, int cluster,
                                 const __grid_constant__ Slices slices,
                                 const __grid_constant__ Targets targets,
                                 const __grid_constant__ LossOptions options,
                                 const __grid_constant__ LossGrad grad,
                                 const __grid_constant__ LossOutput out) {
  ClusterStart start;
  const int64_t index = cluster_index();
  const int rank = static_cast<int>(cluster_rank());
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int pass = rows.pass(index);
  const int64_t row_index = rows.row_in_pass(index);
  T* data = rows.data(index);
  const int begin = slices.begin(rank);
  const int end = slices.begin(rank + 1);
  const int64_t target = targets.of(row_index);
  if (target == options.ignore_index) {  // the whole cluster leaves here
    zero_tiles(data, rows.vocab, begin, end, warps);
    if (rank == 0 && threadIdx.x == 0) out.store(pass, row_index, {0.0f, 0.0f});
    start.wait();
    return;
  }

  // Read the slice into shared memory, with each tile's statistics
  constexpr int kTileVectors = kVectors * kWarpSize;
  auto* partials = reinterpret_cast<LossPartial*>(dynamic_shared);
  uint4* slice = dynamic_shared + tiles;
  static_assert(sizeof(LossPartial) == sizeof(uint4), "the slice is aligned behind the partials");
  const Row<T> row = make_row<T>(data, rows.vocab);
  const bool inside = target >= 0 && target < rows.vocab;
  const int target_id = inside ? static_cast<int>(target) : -1;
  __shared__ float x_target;
  for (int t = begin + warp_id(); t < end; t += warps) {
    Tile<T> tile;
    load_tile<T, Access::kReadFirst>(tile, row, t, -1);
    uint4* kept = slice + (t - begin) * kTileVectors;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) kept[v * kWarpSize + lane_id()] = tile.raw[v];
    const LossPartial partial = loss_tile<T, kMean>(tile, row, options.scale);
    start.wait();
    const auto rank_of_lane = static_cast<unsigned>(lane_id());
    if (lane_id() < cluster) in_cluster_rank(partials, rank_of_lane)[t] = partial;
    const int place = target_id - t * kTileSize<T>;
    if (place >= 0 && place < kTileSize<T>) {
      __syncwarp();
      if (lane_id() < cluster)
        *in_cluster_rank(&x_target, rank_of_lane) =
            to_float(reinterpret_cast<const T*>(kept)[place]);
    }
  }
  start.wait();
  cluster_arrive();
  const float upstream = grad.of(pass, row_index);  // on its way while the barrier is waited at
  cluster_wait();

  __shared__ LossPartial of_row;
  if (warp_id() == 0) {
    const LossPartial merged =
        merge_partials<LossPartial>(tiles, options.scale, [&](int t) { return partials[t]; });
    if (lane_id() == 0) of_row = merged;
  }
  __syncthreads();

  // Overwrite the slice with its gradient
  RowLoss loss;
  const GradScale scale = finish_row<T>(of_row, inside ? x_target : NAN, target_id, upstream,
                                        rows.vocab, options, &loss);
  if (rank == 0 && threadIdx.x == 0) out.store(pass, row_index, loss);
  for (int t = begin + warp_id(); t < end; t += warps) {
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

constexpr int kLossAndGradResident = 3;  // blocks per multiprocessor: 80 registers a thread

template <class T, bool kMean>
__global__ void __launch_bounds__(kRowThreads, kLossAndGradResident)
    loss_and_grad_two_pass_kernel(const __grid_constant__ LossRows<T> rows, int tiles,
                                  const __grid_constant__ Targets targets,
                                  const __grid_constant__ LossOptions options,
                                  const __grid_constant__ LossGrad grad,
                                  const __grid_constant__ LossOutput out) {
  const int64_t index = blockIdx.x;
  const int pass = rows.pass(index);
  const int64_t row_index = rows.row_in_pass(index);
  T* data = rows.data(index);
  const int64_t target = targets.of(row_index);
  if (target == options.ignore_index) {
    zero_tiles(data, rows.vocab, 0, tiles, kRowWarps);
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
    const LossPartial partial = loss_tile<T, kMean>(tile, row, options.scale);
    if (lane_id() == 0) *partial_of<LossPartial>(whole, index, t) = partial;
  }
  __shared__ LossPartial of_row;
  __shared__ float x_target;
  __syncthreads();
  if (warp_id() == 0) {
    const LossPartial merged = merge_row<LossPartial>(whole, index, options.scale);
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
  int cluster;  // blocks per row; 0: the two-pass kernel
  Slices slices;
  LaunchShape shape;
};

// Chosen by arithmetic, not yet measured: the smallest cluster whose slices let three blocks share
// a multiprocessor's 228 KB, so that one loads while another waits at the cluster's barrier; or
// else the largest cluster, provided that a slice fits into a block at all. 8 is the largest
// cluster that every sm_90 GPU starts without asking. A block has as many warps as give each the
// same number of tiles: at V = 157,184 in 16 bits ten, with one tile each.
template <class T>
LossAndGradLaunch choose_loss_and_grad_launch(int64_t rows_of_all_passes, int64_t vocab,
                                              const Device& device) {
  constexpr int kComfortable = 72 * 1024;
  constexpr int kTileBytes = kVectors * kWarpSize * 16;
  LossAndGradLaunch launch{};
  launch.tiles = static_cast<int>((vocab + kTileSize<T> - 1) / kTileSize<T>);
  const auto rows = static_cast<unsigned>(rows_of_all_passes);
  for (int cluster = 1; device.major >= 9 && cluster <= 8; cluster *= 2) {
    const Slices slices{launch.tiles / cluster, launch.tiles % cluster};
    const int bytes =
        slices.most() * kTileBytes + launch.tiles * static_cast<int>(sizeof(LossPartial));
    const int most = device.max_shared_per_block - 1024;  // beside the static shared memory
    if (bytes > most || (bytes > kComfortable && cluster < 8)) continue;
    const int rounds = (slices.most() + kLossClusterWarps - 1) / kLossClusterWarps;
    const int warps = (slices.most() + rounds - 1) / rounds;
    launch.cluster = cluster;
    launch.slices = slices;
    launch.shape = {rows * static_cast<unsigned>(cluster), static_cast<unsigned>(warps * kWarpSize),
                    static_cast<size_t>(bytes), static_cast<unsigned>(cluster)};
    return launch;
  }
  launch.shape = {rows, kRowThreads, launch.tiles * sizeof(LossPartial)};
  return launch;
}

template <class T>
auto launch_loss_and_grad(const LossAndGradLaunch& chosen, const LossRows<T>& rows,
                          const Targets& targets, const LossOptions& options, const LossGrad& grad,
                          const LossOutput& out, Stream stream) {
  const bool mean = options.label_smoothing != 0.0f;
  if (chosen.cluster == 0) {
    const auto kernel =
        mean ? loss_and_grad_two_pass_kernel<T, true> : loss_and_grad_two_pass_kernel<T, false>;
    return launch(chosen.shape, stream, kernel, rows, chosen.tiles, targets, options, grad, out);
  }
  const auto kernel =
      mean ? loss_and_grad_cluster_kernel<T, true> : loss_and_grad_cluster_kernel<T, false>;
  return launch(chosen.shape, stream, kernel, rows, chosen.tiles, chosen.cluster, chosen.slices,
                targets, options, grad, out);
}

}  // namespace dmax::cuda
