// Rows split among blocks: who works on which tiles, and how their statistics become the row's.
//
// Every tile leaves one partial result: in shared memory if one block has the whole row, otherwise
// in global scratch. The last block of a row to finish merges them. From sm_90 on, the blocks of
// few rows may form a cluster per row instead (kCluster): partial results go straight into the
// first block's shared memory, and it merges them behind the cluster's barrier, without scratch,
// counter or fence. Neither which block merges nor how many there are changes a bit: lane l takes
// the tiles l, l + 32, ... in order, then a butterfly joins the lanes.
#pragma once

#include "cuda/mask.cuh"

namespace dmax::cuda {

constexpr int kRowWarps = 8;
constexpr int kRowThreads = kRowWarps * kWarpSize;

// Eight blocks of ten warps, a tile per warp, take the 77 tiles of V = 157,184 in 16 bits at once
constexpr int kClusterRowWarps = 10;
template <bool kCluster>
constexpr int kBlockWarps = kCluster ? kClusterRowWarps : kRowWarps;
template <bool kCluster>
constexpr int kBlockThreads = kBlockWarps<kCluster> * kWarpSize;

struct RowSplit {
  int tiles;           // of a row
  int splits;          // blocks per row
  void* partials;      // [rows, tiles], if splits > 1
  unsigned* counters;  // [rows], zero before and after the launch, if splits > 1

  // Quotients that a block would otherwise compute before its first load
  int fewest;           // each block of a row has this many tiles,
  int with_one_more;    // and this many blocks, the first ones, have one more
  uint32_t reciprocal;  // floor(2^32 / splits) + 1, if splits > 1
};

__host__ __device__ inline RowSplit make_row_split(int tiles, int splits) {
  return {tiles,
          splits,
          nullptr,
          nullptr,
          tiles / splits,
          tiles % splits,
          static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<unsigned>(splits) + 1)};
}

struct TileRange {
  int64_t row;
  int part;  // of the row: 0 to splits - 1
  int begin, end;
};

template <bool kCluster = false>
__device__ __forceinline__ TileRange block_tiles(const RowSplit& split) {
  const unsigned block = blockIdx.x;
  unsigned row;
  int part;
  if constexpr (kCluster) {
    row = cluster_index();
    part = static_cast<int>(cluster_rank());
  } else {
    // The quotient is exact while blocks * splits < 2^32. A row is split only where blocks are few,
    // or in two; a launch has fewer than 2^31 blocks.
    row =
        split.splits == 1 ? block : static_cast<unsigned>(uint64_t{block} * split.reciprocal >> 32);
    part = static_cast<int>(block - row * static_cast<unsigned>(split.splits));
  }
  const int begin = part * split.fewest + min(part, split.with_one_more);
  return {row, part, begin, begin + split.fewest + (part < split.with_one_more ? 1 : 0)};
}

// Where tile `index` of this block's row leaves its partial result
template <class Partial>
__device__ __forceinline__ Partial* partial_of(const RowSplit& split, int64_t row, int index) {
  if (split.splits == 1) return reinterpret_cast<Partial*>(dynamic_shared) + index;
  return static_cast<Partial*>(split.partials) + row * split.tiles + index;
}

// True on all threads of the last of `blocks` blocks to get here. The counter resets itself, which
// lets a captured graph be replayed without a memset.
//
// One atomic with acquire and release is enough: the barrier before it hands the whole block's
// writes to thread 0, its release passes them on with the count, the last block's acquire takes in
// those of every block that has counted, since each count reads the one before it, and the barrier
// after it hands them to all threads. This order is causal, hence transitive; nothing here needs
// the single order of all fences that __threadfence() pays for.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, int blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto top = static_cast<unsigned>(blocks - 1);
    last = increment_acq_rel(counter, top) == top;
  }
  __syncthreads();
  return last;
}

// True in the block that can read all partial results of its row
__device__ __forceinline__ bool last_of_row(const RowSplit& split, int64_t row) {
  if (split.splits > 1) return last_to_arrive(split.counters + row, split.splits);
  __syncthreads();
  return true;
}

// A row's result from those of its tiles, by one warp, the same on every lane; partial(t) loads
// one. Partial has empty(), merge(a, b, scale) and shuffle_xor(lanes), and its size is a multiple
// of 16 bytes.
template <class Partial, class Load>
__device__ __forceinline__ Partial merge_partials(int tiles, float scale, const Load& partial) {
  Partial merged = Partial::empty();
  for (int t = lane_id(); t < tiles; t += kWarpSize)
    merged = Partial::merge(merged, partial(t), scale);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    merged = Partial::merge(merged, merged.shuffle_xor(lanes), scale);
  return merged;
}

template <class Partial>
__device__ __forceinline__ Partial merge_row(const RowSplit& split, int64_t row, float scale) {
  return merge_partials<Partial>(split.tiles, scale, [&](int t) {
    const Partial* p = partial_of<Partial>(split, row, t);
    return split.splits == 1 ? *p : load_other_block(p);
  });
}

// How the blocks of a row meet, by memory and counters or as a cluster. A block makes one when it
// begins, puts each tile's partial result (whole warps call put), and has the row gathered.
template <class Partial, bool kCluster>
class RowMeeting {
 public:
  __device__ __forceinline__ RowMeeting(const RowSplit& split, int64_t row)
      : split_(split), row_(row) {}

  __device__ __forceinline__ void put(int tile, const Partial& partial) {
    if (lane_id() == 0) *partial_of<Partial>(split_, row_, tile) = partial;
  }
  // True in the block that then has all of the row's partial results
  __device__ __forceinline__ bool gather() { return last_of_row(split_, row_); }
  __device__ __forceinline__ Partial merged(float scale) const {
    return merge_row<Partial>(split_, row_, scale);
  }
  // A row that is skipped is left without gather()
  __device__ __forceinline__ void leave() {}

 private:
  const RowSplit& split_;
  int64_t row_;
};

template <class Partial>
class RowMeeting<Partial, true> {
 public:
  __device__ __forceinline__ RowMeeting(const RowSplit& split, int64_t) : split_(split) {}

  __device__ __forceinline__ void put(int tile, const Partial& partial) {
    start_.wait();
    if (lane_id() == 0)
      in_cluster_rank(reinterpret_cast<Partial*>(dynamic_shared), 0)[tile] = partial;
  }
  __device__ __forceinline__ bool gather() {
    start_.wait();
    cluster_arrive();
    cluster_wait();
    return cluster_rank() == 0;
  }
  __device__ __forceinline__ Partial merged(float scale) const {
    const auto* partials = reinterpret_cast<const Partial*>(dynamic_shared);
    return merge_partials<Partial>(split_.tiles, scale, [&](int t) { return partials[t]; });
  }
  __device__ __forceinline__ void leave() { start_.wait(); }

 private:
  const RowSplit& split_;
  ClusterStart start_;
};

struct alignas(16) Top1Partial {
  SoftmaxStats stats;

  static __device__ __forceinline__ Top1Partial empty() { return {empty_stats()}; }
  static __device__ __forceinline__ Top1Partial merge(const Top1Partial& a, const Top1Partial& b,
                                                      float scale) {
    return {merge_stats(a.stats, b.stats, [=](float d) { return exp2_approx(d * scale); })};
  }
  __device__ __forceinline__ Top1Partial shuffle_xor(int lanes) const {
    return {{__shfl_xor_sync(kFullMask, stats.max, lanes),
             __shfl_xor_sync(kFullMask, stats.rest, lanes),
             __shfl_xor_sync(kFullMask, stats.id, lanes)}};
  }
};

// Logits [rows, vocab] in memory; the stride is in elements
template <class T>
struct LogitsView {
  const T* data;
  int64_t row_stride;
  int vocab;
  int suppress;  // id read as -inf, or -1
  float scale;   // log2(e) / temperature

  __device__ __forceinline__ Row<T> row(int64_t index) const {
    return make_row(data + index * row_stride, vocab);
  }
  __device__ __forceinline__ int hidden(int64_t /*row*/) const { return suppress; }
};

template <class T>
struct LogitsView<Masked<T>> : LogitsView<T> {
  const uint8_t* allowed;
  int64_t mask_stride;  // bytes from a row's bits to the next row's; 0: one mask for all rows

  __device__ __forceinline__ MaskedIds hidden(int64_t row) const {
    return {this->suppress, allowed + row * mask_stride};
  }
};

// Puts the partial results of all of this block's tiles. `skipped` rows are not wanted: whether a
// row is one is known only a memory latency after the kernel's start, and the first tile's loads do
// not wait for it. also(tile, stats, index) lets an op take more from every tile.
template <class In, bool kMaySkip, bool kCluster, class Also = NothingElse>
__device__ __forceinline__ void scan_tiles(const LogitsView<In>& logits, const TileRange& range,
                                           RowMeeting<Top1Partial, kCluster>* meeting,
                                           bool skipped = false, const Also& also = {}) {
  using T = ElementOf<In>;
  const Row<T> row = logits.row(range.row);
  const auto hidden = logits.hidden(range.row);
  for (int t = range.begin + warp_id(); t < range.end; t += kBlockWarps<kCluster>) {
    Tile<T> tile;
    load_tile(tile, row, t, hidden);
    if (kMaySkip && skipped_after_loads(tile, skipped)) return;
    const SoftmaxStats stats = tile_stats(tile, row, hidden, logits.scale);
    meeting->put(t, {stats});
    also(tile, stats, t);
  }
}

// ---- Host side ----

// What an op asks of a launch over rows
struct RowWork {
  int64_t rows;
  int64_t vocab;
  int resident;               // blocks of its kernel that share a multiprocessor
  int64_t more_counters = 0;  // for the op itself, after those of RowSplit
  bool has_cluster_kernel = false;
};

struct RowLaunch {
  LaunchShape shape;     // a cluster per row if shape.cluster > 1
  RowSplit split;        // its pointers are null until the caller has memory for them
  size_t partial_bytes;  // for split.partials; 0 if shared memory holds them
  int64_t row_counters;  // for split.counters; 0 if a block has a whole row, or a cluster

  bool cluster() const { return shape.cluster > 1; }
};

// Up to this many rows, a row that would be split among blocks takes a cluster instead: the
// cluster's barrier replaces an atomic and the loads behind it. Measured on an H100 (`python
// bench/gpu_session.py tune`): up to 16 rows clusters save 4 to 8 % of top1_confidence,
// row_statistics and spd_step_, from 32 rows on they cost 1 to 18 %.
constexpr int kMostClusterRows = 16;
constexpr int kMostClusterBlocks = 8;  // that every sm_90 GPU starts without asking

// Blocks per row. A block takes its tiles in rounds of one per warp, and a wave of blocks takes as
// long as its longest. Measured on an H100 with 77 tiles, for 1 to 10 blocks per row and 1 to 1,024
// rows (`python bench/gpu_session.py tune`): the choices below are within 3 % of the best.
//  - Rows that fit into one wave: as few blocks as have the fewest rounds. Against as many blocks
//    as fit that saves 5 to 8 % at 64 rows.
//  - More rows: two rounds a block, which even out the last wave, or whole rows, if they take fewer
//    rounds in all waves or the waves are many. 512 rows take 61.6 us instead of 71.3
//    (row_statistics) and 65.6 instead of 76.9 (spd_step_), where 396 blocks run at once.
inline int64_t choose_splits(int64_t rows, int64_t tiles, int64_t at_once) {
  const auto quotient_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  if (rows <= at_once) {
    const int64_t most = at_once / rows < tiles ? at_once / rows : tiles;
    const int64_t rounds = quotient_up(quotient_up(tiles, most), kRowWarps);
    return quotient_up(tiles, rounds * kRowWarps);
  }
  const int64_t waves = quotient_up(rows, at_once);
  const int64_t in_two_rounds = quotient_up(tiles, 2 * kRowWarps);
  const int64_t rounds = 2 * quotient_up(rows * in_two_rounds, at_once);
  return waves < 4 && rounds <= waves * quotient_up(tiles, kRowWarps) ? in_two_rounds : 1;
}

template <class T, class Partial>
RowLaunch choose_row_launch(const RowWork& work, const Device& device) {
  const auto tiles = static_cast<int>((work.vocab + kTileSize<T> - 1) / kTileSize<T>);
  const size_t row_bytes = tiles * sizeof(Partial);
  const int64_t at_once = static_cast<int64_t>(work.resident) * device.multiprocessors;
  int64_t splits = device.splits > 0 ? device.splits : choose_splits(work.rows, tiles, at_once);
  if (splits > tiles) splits = tiles;
  if (splits < 2 && row_bytes > kDefaultDynamicShared) splits = 2;

  RowLaunch launch{};
  const bool split = splits > 1;
  if (split && work.has_cluster_kernel && device.major >= 9 &&
      work.rows <= device.most_cluster_rows && row_bytes <= kDefaultDynamicShared) {
    unsigned cluster = 2;  // as few blocks as take the row at once
    while (cluster < kMostClusterBlocks && static_cast<int>(cluster) * kClusterRowWarps < tiles)
      cluster *= 2;
    launch.shape = {static_cast<unsigned>(work.rows) * cluster, kBlockThreads<true>, row_bytes,
                    cluster};
    launch.split = make_row_split(tiles, static_cast<int>(cluster));
    return launch;
  }
  launch.shape = {static_cast<unsigned>(work.rows * splits), kRowThreads, split ? 0 : row_bytes};
  launch.split = make_row_split(tiles, static_cast<int>(splits));
  launch.partial_bytes = split ? static_cast<size_t>(work.rows) * row_bytes : 0;
  launch.row_counters = split ? work.rows : 0;
  return launch;
}

// A mask of `words` 32-bit words per row, or of one row of them for all; null: no mask
struct MaskInput {
  const int32_t* words;
  int64_t stride;  // in words
};

template <class T>
LogitsView<T> make_logits_view(const void* data, int64_t row_stride, int64_t vocab,
                               int64_t suppress_token, double temperature) {
  return {static_cast<const T*>(data), row_stride, static_cast<int>(vocab),
          static_cast<int>(suppress_token), softmax_scale(temperature)};
}

// f(view) with a view of the logits, masked where there is a mask
template <class T, class F>
auto with_mask(const LogitsView<T>& logits, const MaskInput& mask, const F& f) {
  if (mask.words == nullptr) return f(logits);
  return f(LogitsView<Masked<T>>{logits, reinterpret_cast<const uint8_t*>(mask.words),
                                 mask.stride * int64_t{sizeof(int32_t)}});
}

}  // namespace dmax::cuda
