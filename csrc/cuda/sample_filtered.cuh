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
  float lowest;    // of the draw tiles' maxima
  int first_best;  // the first draw tile with the maximum
  int broken;      // 1 with a NaN or +inf

  static __device__ __forceinline__ RowFacts combine(const RowFacts& a, const RowFacts& b) {
    const int first = a.max == b.max  ? min(a.first_best, b.first_best)
                      : a.max > b.max ? a.first_best
                                      : b.first_best;
    return {fmaxf(a.max, b.max), fminf(a.lowest, b.lowest), first, a.broken | b.broken};
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
      {{{logits.row(range.row), logits.suppress, reinterpret_cast<const uint8_t*>(allowed), tiles,
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
        0.0f,
        TeamRow<T, kCluster>::mass_unit_for(logits.vocab)},
       0.0f}};
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

  // The row's maximum, and its mass in fixed point, which no order of additions shows in: the
  // number of blocks may depend on the number of rows
  RowFacts facts{-INFINITY, INFINITY, kNoId, 0};
  row.for_draw_tiles([&](int i, const DrawTile& tile) {
    facts = RowFacts::combine(facts, {tile.max, tile.max, i, tile.sum != tile.sum ? 1 : 0});
  });
  facts = team.reduce(facts, RowFacts::combine);
  if (facts.broken != 0) {
    if (!leads) return;
    int id = row.first_id(0, row.row.vocab, [](float x) { return x != x; });
    if (id == kNoId) id = row.first_id(0, row.row.vocab, [](float x) { return x == INFINITY; });
    if (writes) results.store_undefined(range.row, id);
    return;
  }
  row.max = facts.max;
  row.lowest = facts.lowest;
  if (row.max == -INFINITY) {
    if (writes) results.store_undefined(range.row, 0);
    return;
  }
  uint64_t total = 0;
  row.for_draw_tiles([&](int, const DrawTile& tile) { total += row.mass_of(tile); });
  row.total = row.to_sum(team.sum(total));
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
  uint64_t mass = 0;
  Kept kept{0, row.max, row.inverse_temperature, -INFINITY};
  if (options.filters(row.row.vocab)) {
    kept = row.keep(options);
    row.for_units([&](float tile_max) { return kept.in_tile(tile_max); }, [] { return false; },
                  [&](uint4 raw, int unit) {
                    row.hide(raw, [&](int e, float x) { return !kept(row.id_of(unit, e), x); });
                    const DrawTile mine = row.reduce_unit(raw);
                    if (lane_id() % kDrawTileLanes<T> != 0 || !(mine.max > -INFINITY)) return;
                    mass += row.mass_of(mine);
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
    uint64_t mass;
  };
  const Won won = team.reduce(Won{best, mass}, [](const Won& a, const Won& b) {
    return Won{better(a.best, b.best), a.mass + b.mass};
  });
  const float kept_total = options.filters(row.row.vocab) ? row.to_sum(won.mass) : row.total;
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

// From sm_90 on a cluster takes every row whose tiles its blocks can hold. Without a cluster,
// FilteredDraw::tiles takes the partial_bytes, always in global memory.
//
// The costs follow an H100's times of 1 to 128 rows (bench/results/gpu-h100-tried.md): what the
// blocks of a row do not share out, the exchanges, takes as long as 18 tiles. A cluster lies within
// one group of multiprocessors, of which an H100 has eight, of sixteen and eighteen. Two blocks fit
// on a multiprocessor, but then 30 clusters of eight run at once, or 62 of four, and the usual 32
// and 64 rows would take a second round for two of them: so one block per multiprocessor is
// counted. Flat rows of float32 took longer in fewer blocks, however many waited.
template <class T>
RowLaunch choose_filtered_launch(const RowWork& work, const Device& device) {
  constexpr int kExchanges = 18;
  const auto tiles = static_cast<int>((work.vocab + kTileSize<T> - 1) / kTileSize<T>);
  int most = 1;
  while (most < kMostClusterBlocks && most * kRowWarps < tiles) most *= 2;
  const int fewest = sizeof(T) == 4 ? most : most / 4;
  const int group = device.multiprocessors < 16 ? device.multiprocessors : 16;
  RowLaunch launch{};
  int64_t least_cost = 0;
  for (int blocks = most; device.major >= 9 && blocks > 1 && blocks >= fewest; blocks /= 2) {
    const int of_block = (tiles + blocks - 1) / blocks;
    const size_t held =
        of_block * (kVectors * kWarpSize * sizeof(uint4) + kDrawTiles<T> * sizeof(DrawTile));
    if (held + sizeof(FilteredShared) + 1024 > static_cast<size_t>(device.max_shared_per_block))
      continue;
    const int64_t at_once = group / blocks * (device.multiprocessors / group);
    const int64_t waves = at_once > 0 ? (work.rows + at_once - 1) / at_once : work.rows;
    const int64_t cost = waves * (kExchanges + of_block);
    if (least_cost > 0 && cost >= least_cost) continue;
    least_cost = cost;
    launch.shape = {static_cast<unsigned>(work.rows * blocks), kRowThreads, held,
                    static_cast<unsigned>(blocks), sizeof(FilteredShared)};
    launch.split = make_row_split(tiles, blocks);
  }
  if (least_cost > 0) return launch;
  launch = choose_row_launch<T, SamplePartial>(work, device);
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
