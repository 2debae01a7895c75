// The hierarchical draw of rows of logits; shared by sample_tokens, sample_partial and the drawing
// op that starts from hidden states.
//
// A row is read from memory once, for the maxima of its draw tiles. A second loop adds the
// exponentials of the tiles that can matter while a cache still holds the row; a third one, over the
// tiles' masses only, draws a tile. Where filters are on, the masses of what they keep are added in
// between. Draw tiles and the order within them are fixed, so a row's bits depend neither on threads
// nor on other rows nor on how the vocabulary is cut.
#pragma once

#include "cpu/draw_filters.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {

// The key of one row's noise; `seeds` holds one (seed, offset), or one per row
inline NoiseKey noise_key(const int64_t* seeds, bool seed_per_row, int64_t row) {
  const int64_t* pair = seeds + (seed_per_row ? 2 * row : 0);
  return {static_cast<uint64_t>(pair[0]), static_cast<uint64_t>(pair[1]),
          seed_per_row ? 0u : static_cast<uint32_t>(row)};
}

constexpr int64_t kDrawTilesPerTile = kTile / kDrawTile;

inline int64_t num_draw_tiles(int64_t vocab) { return (vocab + kDrawTile - 1) / kDrawTile; }

struct Drawn {
  float score;   // of the tile
  int64_t token; // counted from the row's first
  float logit;
};

// One row on its way to a draw
template <class T>
struct RowDraw {
  VisibleRow<T> row;
  double temperature;  // that of the softmax: 1 where the row is greedy
  float* of_tiles;     // maxima of the tiles of kTile tokens
  float* maxima;       // of the draw tiles
  float* masses;       // of the draw tiles, relative to their maxima; 0 where negligible
  float maximum = 0;
  double total = 0;  // sum of exp((x - maximum) / temperature)

  float scale() const { return softmax_scale(temperature); }
  int64_t num_draw_tiles() const { return cpu::num_draw_tiles(row.vocab); }
  // False if a visible logit is NaN or +inf, or if all are -inf: the row then has no softmax
  bool defined() const { return std::isfinite(maximum); }

  int64_t tile_width(int64_t tile) const { return std::min(kTile, row.vocab - tile * kTile); }

  void find_maxima(int64_t tile) const {
    float* out = maxima + tile * kDrawTilesPerTile;
    float buffer[kTile];
    const bool any = row.visit(tile * kTile, tile_width(tile), buffer, [&](const auto* x, int64_t n) {
      of_tiles[tile] = draw_kernels<std::decay_t<decltype(*x)>>().maxima(x, n, out);
    });
    if (any) return;
    of_tiles[tile] = -std::numeric_limits<float>::infinity();
    std::fill_n(out, cpu::num_draw_tiles(tile_width(tile)), of_tiles[tile]);
  }

  void find_maximum() {
    maximum = -std::numeric_limits<float>::infinity();
    for (int64_t tile = 0; tile < row.num_tiles(); ++tile) {
      if (of_tiles[tile] > maximum || std::isnan(of_tiles[tile])) maximum = of_tiles[tile];
    }
  }

  void add_masses(int64_t tile) const {
    if (!defined()) return;
    float* out = masses + tile * kDrawTilesPerTile;
    const double depth = (static_cast<double>(maximum) - of_tiles[tile]) / temperature;
    float buffer[kTile];
    // The best tile's score is at least maximum / temperature - 2.9, and that of a tile whose
    // logits lie 30 deeper at most 30 - log(64) - 22.9 = 2.9 less: it is not drawn either
    if (!(depth < kNegligibleDepth) ||
        !row.visit(tile * kTile, tile_width(tile), buffer, [&](const auto* x, int64_t n) {
          draw_kernels<std::decay_t<decltype(*x)>>().masses(
              x, n, maxima + tile * kDrawTilesPerTile, scale(), out);
        })) {
      std::fill_n(out, cpu::num_draw_tiles(tile_width(tile)), 0.0f);
    }
  }

  double weight(float logit) const {
    return std::exp((static_cast<double>(logit) - maximum) / temperature);
  }

  double total_mass() const {
    return race_kernels().total_mass(maxima, masses, num_draw_tiles(), maximum, scale());
  }

  // The first visible token that has the maximum; of a NaN, the first NaN; 0 if all are -inf
  int64_t first_maximum() const {
    if (maximum == -std::numeric_limits<float>::infinity()) return 0;
    int64_t tile = 0;
    while (of_tiles[tile] != maximum && !(std::isnan(maximum) && std::isnan(of_tiles[tile]))) ++tile;
    int64_t place = 0;
    float buffer[kTile];
    row.visit(tile * kTile, tile_width(tile), buffer, [&](const auto* x, int64_t n) {
      place = tile_kernels<std::decay_t<decltype(*x)>>().find(x, n, maximum);
    });
    return tile * kTile + place;
  }

  // Logits of the tokens begin .. begin + n that are kept, -inf at the others
  void load_kept(int64_t begin, int64_t n, const Cut& cut, float* buffer) const {
    row.load(begin, n, buffer);
    if (cut.value == -std::numeric_limits<float>::infinity()) return;
    race_kernels().drop_below(buffer, n, cut.value);
    for (int64_t i = n - 1; i >= 0 && begin + i > cut.last_id; --i) {
      if (buffer[i] == cut.value) buffer[i] = -std::numeric_limits<float>::infinity();
    }
  }

  // Leaves of the masses those of the tokens that are kept
  void keep(const Cut& cut) const {
    const int64_t tiles = num_draw_tiles();
    float buffer[kTile];
    for (int64_t tile = 0; tile < tiles;) {
      int64_t end = tile;  // of a run of tiles of which something is kept
      while (end < tiles && end - tile < kDrawTilesPerTile && maxima[end] >= cut.value) ++end;
      if (end == tile) {
        masses[tile++] = 0;
        continue;
      }
      const int64_t begin = tile * kDrawTile;
      const int64_t n = std::min(end * kDrawTile, row.vocab) - begin;
      load_kept(begin, n, cut, buffer);
      float kept[kDrawTilesPerTile];
      draw_kernels<float>().maxima(buffer, n, kept);
      draw_kernels<float>().masses(buffer, n, maxima + tile, scale(), masses + tile);
      for (int64_t i = 0; tile + i < end; ++i) {  // equal to the cut, but of higher ids
        if (kept[i] == -std::numeric_limits<float>::infinity()) masses[tile + i] = 0;
      }
      tile = end;
    }
  }

  // A draw from the tiles' masses, of a row whose ids begin at first_id, a multiple of kDrawTile.
  // `scores` has room for one per draw tile
  Drawn draw(const NoiseKey& key, const Cut& cut, int64_t first_id, float* scores) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const RaceKernels& kernels = race_kernels();
    const float t = static_cast<float>(temperature);
    const int64_t tiles = num_draw_tiles();
    kernels.log_masses(maxima, masses, tiles, t, scores);
    const int64_t first = int64_t{kTileCounters} + first_id / kDrawTile;
    const PerturbedBest best =
        kernels.race(scores, tiles, first, key, 1.0f, {-kInfinity, first + tiles});
    const int64_t begin = (best.id - first) * kDrawTile;
    const int64_t n = std::min<int64_t>(kDrawTile, row.vocab - begin);
    float logits[kDrawTile];
    load_kept(begin, n, cut, logits);
    const int64_t token =
        kernels.race(logits, n, first_id + begin, key, t, {-kInfinity, first_id + begin + n}).id -
        first_id;
    return {best.score, token, logits[token - begin]};
  }
};

// Memory of a thread for its rows
struct DrawScratch {
  explicit DrawScratch(int64_t vocab) : scores(num_draw_tiles(vocab)) {}
  std::vector<float> scores;
  FilterScratch filters;
};

// Calls done(i, row, scratch) with every row 0 .. count, read and weighed; row_of(i) and
// temperature_of(i) say which it is. If there are enough rows for every thread, a thread takes
// whole rows; if they are few and long, all threads share the tiles of every row.
template <class T, class RowOf, class TemperatureOf, class Done>
void draw_rows(int64_t count, int64_t vocab, const RowOf& row_of,
               const TemperatureOf& temperature_of, const Done& done) {
  const int64_t tiles = (vocab + kTile - 1) / kTile;
  const int64_t draw_tiles = num_draw_tiles(vocab);
  const int64_t floats = tiles + 2 * draw_tiles;
  const auto row_in = [&](int64_t i, float* memory) {
    return RowDraw<T>{row_of(i), temperature_of(i), memory, memory + tiles,
                      memory + tiles + draw_tiles};
  };
  const bool worth_sharing = count * vocab >= 2 * kLogitsPerThread;
  if (count >= 2 * num_threads() || num_threads() == 1 || !worth_sharing) {
    parallel_for_rows(count, vocab, [&](int64_t begin, int64_t end) {
      std::vector<float> memory(floats);
      DrawScratch scratch(vocab);
      for (int64_t i = begin; i < end; ++i) {
        RowDraw<T> row = row_in(i, memory.data());
        for (int64_t tile = 0; tile < tiles; ++tile) row.find_maxima(tile);
        row.find_maximum();
        for (int64_t tile = 0; tile < tiles; ++tile) row.add_masses(tile);
        row.total = row.total_mass();
        done(i, row, &scratch);
      }
    });
    return;
  }
  constexpr int64_t kGrain = kLogitsPerThread / kTile;
  std::vector<float> memory(count * floats);
  std::vector<RowDraw<T>> rows;
  rows.reserve(count);
  for (int64_t i = 0; i < count; ++i) rows.push_back(row_in(i, &memory[i * floats]));
  parallel_for(count * tiles, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rows[i / tiles].find_maxima(i % tiles);
  });
  for (RowDraw<T>& row : rows) row.find_maximum();
  parallel_for(count * tiles, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rows[i / tiles].add_masses(i % tiles);
  });
  parallel_for_rows(count, vocab, [&](int64_t begin, int64_t end) {
    DrawScratch scratch(vocab);
    for (int64_t i = begin; i < end; ++i) {
      rows[i].total = rows[i].total_mass();
      done(i, rows[i], &scratch);
    }
  });
}

}  // namespace dmax::cpu
