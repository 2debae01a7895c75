// sample_tokens with top_k, top_p, min_p, a mask of allowed ids, or options per row.
//
// All blocks of a row read it once and leave the maximum and the mass of every draw tile. Then the
// cut is found, the last token that the filters keep, in the order of the logits (descending, equal
// ones by id): by the blocks together if they are a cluster, which also hold the row's logits in
// shared memory, else by the last block to finish, which reads them again. Every filter keeps a
// prefix of that order. The draw tiles' maxima bound the cut from below, and only tiles that reach
// above the bound are looked at again: few on a peaked row, up to all of them on a flat one. What
// is left after the cut is drawn as always.
#pragma once

#include "cuda/filter_search.cuh"
#include "cuda/sample.cuh"

namespace dmax::cuda {

constexpr int kFilteredResident = 2;  // blocks per multiprocessor: 128 registers a thread
struct FilteredDraw {
  DrawOptions options;       // of every row, if row_options is null
  const float* row_options;  // [rows, 4]
  const uint32_t* allowed;   // a bit per id; null: every id
  int64_t allowed_stride;    // words from a row's bits to the next row's; 0: one mask for all
  DrawTile* tiles;           // [rows, tiles of a row, kDrawTiles], scratch

  __device__ __forceinline__ DrawOptions of_row(int64_t row) const {
    return row_options != nullptr ? draw_options_of(row_options, row) : options;
  }
};

// What the draw tiles say of a row
struct RowFacts {
  float max;
  float sum;       // of exp((x - max) / temperature); NaN with a NaN or +inf
  float lowest;    // of the draw tiles' maxima
  int first_best;  // the first draw tile with the maximum

  static __device__ __forceinline__ RowFacts combine(const RowFacts& a, const RowFacts& b,
                                                     float scale) {
    const float max = fmaxf(a.max, b.max);
    const float reference = finite_reference(max);
    const float sum = a.sum * exp2_approx((a.max - reference) * scale) +
                      b.sum * exp2_approx((b.max - reference) * scale);
    const int first = a.max == b.max  ? min(a.first_best, b.first_best)
                      : a.max > b.max ? a.first_best
                                      : b.first_best;
    return {max, sum, fminf(a.lowest, b.lowest), first};
  }
};

template <class T, bool kCluster>
__global__ void __launch_bounds__(kRowThreads, kFilteredResident)
    sample_filtered_kernel(const __grid_constant__ LogitsView<T> logits,
                           const __grid_constant__ RowSplit split,
                           const __grid_constant__ SampleKey key,
                           const __grid_constant__ FilteredDraw draw,
                           const __grid_constant__ SampleResults results) {
  const TileRange range = block_tiles<kCluster>(split);
  const DrawOptions options = draw.of_row(range.row);
  const bool valid = options.valid();
  const bool greedy = options.greedy();
  const double temperature = valid && !greedy ? options.temperature : 1.0;
  DrawTile* const tiles = draw.tiles + range.row * split.tiles * kDrawTiles<T>;
  const uint32_t* allowed =
      draw.allowed == nullptr ? nullptr : draw.allowed + range.row * draw.allowed_stride;
  FilteredRow<T, kCluster> row{
      {{logits.row(range.row), logits.suppress, reinterpret_cast<const uint8_t*>(allowed), tiles,
        split.tiles},
       Team<kCluster>(split.splits),
       range.begin,
       range.end,
       dynamic_shared,
       reinterpret_cast<DrawTile*>(dynamic_shared +
                                   (range.end - range.begin) * kVectors * kWarpSize),
       static_cast<float>(kLog2EDouble / temperature),
       static_cast<float>(1.0 / temperature),
       -INFINITY,
       -INFINITY,
       0.0f},
      0.0f};
  Team<kCluster>& team = row.team;

  if (valid) {
    for (int t = range.begin + warp_id(); t < range.end; t += kRowWarps) {
      Tile<T> tile;
      row.load(tile, t, kFullMask);
      if constexpr (kCluster) row.hold(tile, t);
      const DrawTile mine = reduce_draw_tile(tile, row.scale);
      if (counts<T>()) row.put_draw_tile(t * kDrawTiles<T> + own_draw_tile<T>(), mine, tiles);
    }
  }
  if constexpr (!kCluster) {
    if (!last_of_row(split, range.row)) return;
    row.first_tile = 0;
    row.end_tile = split.tiles;
  }
  team.begin();
  const bool leads = team.rank() == 0;
  const bool writes = leads && threadIdx.x == 0;
  if (!valid) {
    if (writes) results.store_undefined(range.row, 0);
    return;
  }

  // The row's maximum and mass, in an order that depends on the vocabulary alone
  const float scale = row.scale;
  const auto combine = [scale](const RowFacts& a, const RowFacts& b) {
    return RowFacts::combine(a, b, scale);
  };
  RowFacts facts{-INFINITY, 0.0f, INFINITY, kNoId};
  row.for_draw_tiles([&](int i, const DrawTile& tile) {
    facts = combine(facts, {tile.max, tile.sum, tile.max, i});
  });
  facts = team.reduce(facts, combine);
  if (facts.sum != facts.sum) {  // a NaN or +inf
    if (!leads) return;
    int id = row.first_id(0, row.row.vocab, [](float x) { return x != x; });
    if (id == kNoId) id = row.first_id(0, row.row.vocab, [](float x) { return x == INFINITY; });
    if (writes) results.store_undefined(range.row, id);
    return;
  }
  row.max = facts.max;
  row.lowest = facts.lowest;
  row.total = facts.sum;
  if (row.max == -INFINITY) {
    if (writes) results.store_undefined(range.row, 0);
    return;
  }
  const float top1 = 1.0f / row.total;
  if (greedy) {
    const int begin = facts.first_best * kDrawTile;
    if (!leads) return;
    const int id = row.first_id(begin, begin + kDrawTile, [&](float x) { return x == row.max; });
    if (writes) results.store(range.row, id, top1, top1, top1);
    return;
  }

  // The best draw tile of what is kept, and its mass in all
  const NoiseStream noise = key.noise(range.row);
  Scored best{-INFINITY, kNoId};
  float mass = 0.0f;
  Kept kept{0, row.max, row.inverse_temperature, -INFINITY};
  if (options.filters(row.row.vocab)) {
    kept = row.keep(options);
    row.for_units([&](float tile_max) { return kept.in_tile(tile_max); }, [] { return false; },
                  [&](uint4 raw, int unit) {
                    row.hide(raw, [&](int e, float x) { return !kept(row.id_of(unit, e), x); });
                    const DrawTile mine = row.reduce_unit(raw);
                    if (lane_id() % kDrawTileLanes<T> != 0 || !(mine.max > -INFINITY)) return;
                    mass = fmaf(mine.sum, exp2_approx((mine.max - row.max) * row.scale), mass);
                    const int index = row.draw_tile_of(unit);
                    best.offer(tile_score(log_mass(mine, row.inverse_temperature), index, noise,
                                          key.first_id),
                               index);
                  });
  } else {
    row.for_draw_tiles([&](int i, const DrawTile& tile) {
      best.offer(tile_score(log_mass(tile, row.inverse_temperature), i, noise, key.first_id), i);
    });
  }
  struct Won {
    Scored best;
    float mass;
  };
  const Won won = team.reduce(Won{best, mass}, [](const Won& a, const Won& b) {
    return Won{better(a.best, b.best), a.mass + b.mass};
  });
  const float kept_total = options.filters(row.row.vocab) ? won.mass : row.total;
  const int winner = won.best.place;
  if (!leads || warp_id() != 0) return;
  const Drawn drawn =
      draw_in_tile(row.row, winner, noise, key.first_id, row.inverse_temperature,
                   [&](int id, float x) { return row.is_visible(id) && kept(id, x); });
  if (lane_id() != 0) return;
  const float weight = exp2_approx((drawn.logit - row.max) * row.scale);
  results.store(range.row, drawn.id, weight / kept_total, top1, fminf(top1, weight));
}

// ---- Host side ----

// The kernel above wherever a row may need more than sample_rows_kernel does
inline bool needs_filtered_kernel(const DrawOptions& options, int64_t vocab, bool has_row_options,
                                  bool has_allowed) {
  return has_row_options || has_allowed || (!options.greedy() && options.filters(vocab));
}

// From sm_90 on a cluster takes every row whose tiles its blocks can hold, however many rows there
// are: how the row is summed up depends on the vocabulary alone. Without a cluster,
// FilteredDraw::tiles takes the partial_bytes, always in global memory.
template <class T>
RowLaunch choose_filtered_launch(const RowWork& work, const Device& device) {
  const auto tiles = static_cast<int>((work.vocab + kTileSize<T> - 1) / kTileSize<T>);
  unsigned blocks = 1;
  while (blocks < kMostClusterBlocks && static_cast<int>(blocks) * kRowWarps < tiles) blocks *= 2;
  const size_t of_block = (tiles + blocks - 1) / blocks;
  const size_t held =
      of_block * (kVectors * kWarpSize * sizeof(uint4) + kDrawTiles<T> * sizeof(DrawTile));
  if (blocks > 1 && device.major >= 9 &&
      held + sizeof(FilteredShared) + 1024 <= static_cast<size_t>(device.max_shared_per_block)) {
    RowLaunch launch{};
    launch.shape = {static_cast<unsigned>(work.rows) * blocks, kRowThreads, held, blocks,
                    sizeof(FilteredShared)};
    launch.split = make_row_split(tiles, static_cast<int>(blocks));
    return launch;
  }
  RowLaunch launch = choose_row_launch<T, SamplePartial>(work, device);
  launch.shape.shared_bytes = 0;
  launch.partial_bytes =
      static_cast<size_t>(work.rows) * launch.split.tiles * kDrawTiles<T> * sizeof(DrawTile);
  return launch;
}

template <class T>
auto launch_sample_filtered(const RowLaunch& run, const LogitsView<T>& logits, const SampleKey& key,
                            const FilteredDraw& draw, const SampleResults& results, Stream stream) {
  const auto kernel =
      run.cluster() ? sample_filtered_kernel<T, true> : sample_filtered_kernel<T, false>;
  return launch(run.shape, stream, kernel, logits, run.split, key, draw, results);
}

}  // namespace dmax::cuda
