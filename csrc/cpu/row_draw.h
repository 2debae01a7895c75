// The hierarchical draw of one row of logits; shared by sample_tokens, sample_partial and the
// drawing op that starts from hidden states.
//
// A row is read from memory once, for the maxima of its draw tiles. A second loop adds the
// exponentials of the tiles that can matter while a cache still holds the row; a third one, over
// the tiles' masses only, draws a tile. Where filters are on, the masses of what they keep are
// added in between. Draw tiles and the order within them are fixed, so a row's bits depend neither
// on threads nor on other rows nor on how the vocabulary is cut.
#pragma once

#include "cpu/visible_row.h"
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

// Kept are the logits above `value`, and those equal to it up to `last_id`
struct Cut {
  float value = -std::numeric_limits<float>::infinity();
  int64_t last_id = std::numeric_limits<int64_t>::max();

  bool keeps_all() const { return value == -std::numeric_limits<float>::infinity(); }
};

inline Cut stricter(const Cut& a, const Cut& b) {
  if (a.value != b.value) return a.value > b.value ? a : b;
  return a.last_id < b.last_id ? a : b;
}

// Logits of the tokens begin .. begin + n that are kept, -inf at the others
template <class T>
void load_kept(const VisibleRow<T>& row, int64_t begin, int64_t n, const Cut& cut, float* buffer) {
  row.load(begin, n, buffer);
  if (cut.keeps_all()) return;
  race_kernels().drop_below(buffer, n, cut.value);
  if (cut.last_id >= begin + n) return;
  for (int64_t i = std::max<int64_t>(cut.last_id + 1 - begin, 0); i < n; ++i) {
    i += tile_kernels<float>().find(buffer + i, n - i, cut.value);
    if (i < n) buffer[i] = -std::numeric_limits<float>::infinity();
  }
}

struct Drawn {
  float score;    // of the tile
  int64_t token;  // counted from the row's first
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
    const bool any = row.visit(
        tile * kTile, tile_width(tile), buffer,
        [&](const auto* x, int64_t n) { of_tiles[tile] = draw_kernels_of(x).maxima(x, n, out); });
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
          draw_kernels_of(x).masses(x, n, maxima + tile * kDrawTilesPerTile, scale(), out);
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
    while (of_tiles[tile] != maximum && !(std::isnan(maximum) && std::isnan(of_tiles[tile])))
      ++tile;
    int64_t place = 0;
    float buffer[kTile];
    row.visit(tile * kTile, tile_width(tile), buffer, [&](const auto* x, int64_t n) {
      place = tile_kernels<std::decay_t<decltype(*x)>>().find(x, n, maximum);
    });
    return tile * kTile + place;
  }

  // Calls f(begin, n) with the tokens of adjacent draw tiles, kTile at most, whose maxima are not
  // below `threshold`. Few are on most rows, and finding the next one takes a loop over vectors.
  template <class F>
  void for_each_run(float threshold, const F& f) const {
    const TileKernels<float>& kernels = tile_kernels<float>();
    const int64_t tiles = num_draw_tiles();
    const float below = std::nextafter(threshold, -std::numeric_limits<float>::infinity());
    for (int64_t first = 0; first < tiles; first += kDrawTilesPerTile) {
      if (!(of_tiles[first / kDrawTilesPerTile] >= threshold)) continue;
      const int64_t last = std::min(tiles, first + kDrawTilesPerTile);
      int64_t tile = first;
      while (true) {
        // Nothing is above -inf, and all of it is to be found
        if (below < threshold) tile += kernels.find_above(maxima + tile, last - tile, below);
        if (tile >= last) break;
        int64_t end = tile + 1;
        while (end < last && maxima[end] >= threshold) ++end;
        f(tile * kDrawTile, std::min(end * kDrawTile, row.vocab) - tile * kDrawTile);
        tile = end;
      }
    }
  }

  // Makes the masses those of the tokens that are kept
  void keep(const Cut& cut) const {
    if (cut.keeps_all()) return;
    std::fill_n(masses, num_draw_tiles(), 0.0f);
    for_each_run(cut.value, [&](int64_t begin, int64_t n) {
      const int64_t tile = begin / kDrawTile;
      float buffer[kTile], kept[kDrawTilesPerTile];
      load_kept(row, begin, n, cut, buffer);
      draw_kernels<float>().maxima(buffer, n, kept);
      draw_kernels<float>().masses(buffer, n, maxima + tile, scale(), masses + tile);
      for (int64_t i = 0; i < cpu::num_draw_tiles(n); ++i) {  // equal to the cut, with higher ids
        if (kept[i] == -std::numeric_limits<float>::infinity()) masses[tile + i] = 0;
      }
    });
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
    load_kept(row, begin, n, cut, logits);
    const int64_t token =
        kernels.race(logits, n, first_id + begin, key, t, {-kInfinity, first_id + begin + n}).id -
        first_id;
    return {best.score, token, logits[token - begin]};
  }
};

}  // namespace dmax::cpu
