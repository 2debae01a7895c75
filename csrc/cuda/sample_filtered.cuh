// sample_tokens with top_k, top_p, min_p, a mask of allowed ids, or options per row.
//
// All blocks of a row read it once and leave the maximum and the mass of every draw tile. The
// row's last block then finds the cut, the last token that the filters keep, in the order of the
// logits (descending, equal ones by id). Every filter keeps a prefix of that order. The draw tiles'
// maxima bound the cut from below, and only tiles that reach above the bound are read again: few on
// a peaked row, up to all of them on a flat one. What is left after the cut is drawn as always.
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

template <class T>
__global__ void __launch_bounds__(kRowThreads, kFilteredResident)
    sample_filtered_kernel(const __grid_constant__ LogitsView<T> logits,
                           const __grid_constant__ RowSplit split,
                           const __grid_constant__ SampleKey key,
                           const __grid_constant__ FilteredDraw draw,
                           const __grid_constant__ SampleResults results) {
  const TileRange range = block_tiles(split);
  const DrawOptions options = draw.of_row(range.row);
  const bool valid = options.valid();
  const bool greedy = options.greedy();
  const double temperature = valid && !greedy ? options.temperature : 1.0;
  DrawTile* const tiles = draw.tiles + range.row * split.tiles * kDrawTiles<T>;
  const uint32_t* allowed =
      draw.allowed == nullptr ? nullptr : draw.allowed + range.row * draw.allowed_stride;
  FilteredRow<T> row{{logits.row(range.row), logits.suppress,
                      reinterpret_cast<const uint8_t*>(allowed), tiles, split.tiles},
                     static_cast<float>(kLog2EDouble / temperature),
                     static_cast<float>(1.0 / temperature),
                     -INFINITY,
                     0.0f,
                     0.0f};

  if (valid) {
    for (int t = range.begin + warp_id(); t < range.end; t += kRowWarps) {
      Tile<T> tile;
      row.load(tile, t, kFullMask);
      const DrawTile mine = reduce_draw_tile(tile, row.scale);
      if (counts<T>()) tiles[t * kDrawTiles<T> + own_draw_tile<T>()] = mine;
    }
  }
  if (!last_of_row(split, range.row)) return;
  const bool writes = threadIdx.x == 0;
  if (!valid) {
    if (writes) results.store_undefined(range.row, 0);
    return;
  }

  // The row's maximum and mass, in an order that depends on the vocabulary alone
  const int first_tile = static_cast<int>(threadIdx.x);
  float max = -INFINITY;
  bool broken = false;
  for (int i = first_tile; i < row.num_draw_tiles(); i += kRowThreads) {
    const DrawTile tile = row.draw_tile(i);
    max = fmaxf(max, tile.max);
    broken |= tile.sum != tile.sum;
  }
  row.max = block_max(max);
  if (block_min(broken ? 0 : 1) == 0) {
    int id = row.first_id(0, row.row.vocab, [](float x) { return x != x; });
    if (id == kNoId) id = row.first_id(0, row.row.vocab, [](float x) { return x == INFINITY; });
    if (writes) results.store_undefined(range.row, id);
    return;
  }
  if (row.max == -INFINITY) {
    if (writes) results.store_undefined(range.row, 0);
    return;
  }
  float total = 0.0f;
  int first_best = kNoId;
  for (int i = first_tile; i < row.num_draw_tiles(); i += kRowThreads) {
    const DrawTile tile = row.draw_tile(i);
    if (tile.max > -INFINITY)
      total = fmaf(tile.sum, exp2_approx((tile.max - row.max) * row.scale), total);
    if (tile.max == row.max) first_best = min(first_best, i);
  }
  row.total = block_sum(total);
  const float top1 = 1.0f / row.total;
  if (greedy) {
    const int begin = block_min(first_best) * kDrawTile;
    const int id = row.first_id(begin, begin + kDrawTile, [&](float x) { return x == row.max; });
    if (writes) results.store(range.row, id, top1, top1, top1);
    return;
  }

  // The best draw tile of what is kept, and its mass in all
  const NoiseStream noise = key.noise(range.row);
  Scored best{-INFINITY, kNoId};
  float kept_total = row.total;
  Kept kept{0, row.max, row.inverse_temperature, -INFINITY};
  if (options.filters(row.row.vocab)) {
    kept = row.keep(options);
    float mass = 0.0f;
    row.for_tiles([&](float tile_max) { return kept.in_tile(tile_max); }, [] { return false; },
                  [&](Tile<T>& tile, int t) {
                    row.for_vectors(tile, [&](uint4& raw, int v) {
                      row.hide(raw, [&](int e, float x) { return !kept(tile.id(v, e), x); });
                    });
                    const DrawTile mine = reduce_draw_tile(tile, row.scale);
                    if (!(mine.max > -INFINITY)) return;
                    if (counts<T>())
                      mass = fmaf(mine.sum, exp2_approx((mine.max - row.max) * row.scale), mass);
                    const int index = t * kDrawTiles<T> + own_draw_tile<T>();
                    best.offer(tile_score(log_mass(mine, row.inverse_temperature), index, noise,
                                          key.first_id),
                               index);
                  });
    kept_total = block_sum(mass);
  } else {
    for (int i = first_tile; i < row.num_draw_tiles(); i += kRowThreads) {
      const DrawTile tile = row.draw_tile(i);
      if (tile.max > -INFINITY)
        best.offer(tile_score(log_mass(tile, row.inverse_temperature), i, noise, key.first_id), i);
    }
  }
  const float score = block_max(best.score);
  const int winner = block_min(best.score == score ? best.place : kNoId);
  if (warp_id() != 0) return;
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

// FilteredDraw::tiles takes the partial_bytes, always in global memory
template <class T>
RowLaunch choose_filtered_launch(const RowWork& work, const Device& device) {
  RowLaunch launch = choose_row_launch<T, SamplePartial>(work, device);
  launch.shape.shared_bytes = 0;
  launch.partial_bytes =
      static_cast<size_t>(work.rows) * launch.split.tiles * kDrawTiles<T> * sizeof(DrawTile);
  return launch;
}

}  // namespace dmax::cuda
