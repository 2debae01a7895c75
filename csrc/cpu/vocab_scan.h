// Top-1 and softmax normaliser of rows of logits.
//
// A row is read from memory once. A first loop finds the maximum of every tile; a second one, with
// the row's maximum known, adds the exponentials of the tiles that can matter, while a cache still
// holds the row. A tile far below the maximum is skipped. Tiles and their order are fixed, so a
// row's bits depend neither on the number of threads nor on the number of rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "common/tensor_checks.h"
#include "cpu/parallel.h"
#include "cpu/row_stats.h"
#include "cpu/simd/tile_kernels.h"
#include "cpu/visible_row.h"

namespace dmax::cpu {

// The temperature of every row; throws at one that is out of range
inline std::vector<double> temperatures_of(const char* op, int64_t rows, double temperature,
                                           const OptionalTensor& temperatures) {
  std::vector<double> values(rows, temperature);
  if (!temperatures) return values;
  const Tensor given = as_contiguous(*temperatures);
  for (int64_t i = 0; i < rows; ++i) {
    values[i] = given.const_data_ptr<float>()[i];
    if (!is_temperature(values[i])) {
      check_temperature(op, values[i], " in row " + std::to_string(i));
    }
  }
  return values;
}

// Which logits count: all but the id `suppress` (-1: none)
struct VocabScan {
  int64_t vocab;
  int64_t suppress = -1;
  double temperature = 1.0;
  const double* temperatures = nullptr;  // one per row, in place of `temperature`

  VocabScan of_row(int64_t row) const {
    return temperatures ? VocabScan{vocab, suppress, temperatures[row]} : *this;
  }

  int64_t num_tiles() const { return (vocab + kTile - 1) / kTile; }
  float scale() const { return softmax_scale(temperature); }
};

// A row of logits, and the mask of its tokens (nullptr: every token is allowed)
template <class T>
struct ScannedRow {
  const T* x;
  const uint32_t* words;

  ScannedRow(const T* row, const uint32_t* row_words = nullptr) : x(row), words(row_words) {}

  // Calls f(kernels, y, begin, n) with the n logits y of a tile, which begins at token `begin`:
  // where some are not allowed, a float32 copy with -inf at those. No call if none is allowed.
  template <class F>
  void visit(const TileKernels<T>& kernels, const VocabScan& scan, int64_t tile, const F& f) const {
    const int64_t begin = tile * kTile;
    const int64_t n = std::min(kTile, scan.vocab - begin);
    const Visibility visible = visibility(words, begin, n);
    if (visible == Visibility::kAll) return f(kernels, x + begin, begin, n);
    if (visible == Visibility::kNone) return;
    float buffer[kTile];
    draw_kernels<T>().widen_allowed(buffer, x + begin, n, words + begin / 32);
    f(tile_kernels<float>(), static_cast<const float*>(buffer), begin, n);
  }

  bool allows(int64_t token) const {
    return !words || ((words[token / 32] >> token % 32) & 1u) != 0;
  }
  // -inf if the token is not allowed
  float value(const TileKernels<T>& kernels, int64_t token) const {
    return allows(token) ? kernels.value(x + token) : -std::numeric_limits<float>::infinity();
  }
};

// Calls f over [begin, end) without the places `a` and `b`; one outside the range has no effect
template <class F>
void for_each_range(int64_t begin, int64_t end, int64_t a, int64_t b, const F& f) {
  if (a > b) std::swap(a, b);
  for (int64_t hole : {a, b}) {
    if (hole < begin || hole >= end) continue;
    if (hole > begin) f(begin, hole);
    begin = hole + 1;
  }
  if (begin < end) f(begin, end);
}

template <class T>
float tile_maximum(const TileKernels<T>& kernels, const ScannedRow<T>& row, const VocabScan& scan,
                   int64_t tile) {
  float best = -std::numeric_limits<float>::infinity();
  row.visit(kernels, scan, tile, [&](const auto& of_y, const auto* y, int64_t begin, int64_t n) {
    for_each_range(begin, begin + n, scan.suppress, -1, [&](int64_t from, int64_t to) {
      const float maximum = of_y.maximum(y + (from - begin), to - from);
      if (maximum > best || std::isnan(maximum)) best = maximum;
    });
  });
  return best;
}

// The row's maximum and its first place, from the maxima of the tiles
template <class T>
RowStats find_top1(const TileKernels<T>& kernels, const ScannedRow<T>& row, const VocabScan& scan,
                   const float* tile_maxima) {
  int64_t best_tile = 0;
  for (int64_t tile = 0; tile < scan.num_tiles(); ++tile) {
    if (std::isnan(tile_maxima[tile])) {
      best_tile = tile;
      break;
    }
    if (tile_maxima[tile] > tile_maxima[best_tile]) best_tile = tile;
  }
  RowStats stats{tile_maxima[best_tile], 0, -1};
  if (stats.maximum == -std::numeric_limits<float>::infinity()) {
    stats.token = 0;  // nothing visible has any mass
    return stats;
  }
  row.visit(kernels, scan, best_tile,
            [&](const auto& of_y, const auto* y, int64_t begin, int64_t n) {
              for_each_range(begin, begin + n, scan.suppress, -1, [&](int64_t from, int64_t to) {
                if (stats.token >= 0) return;
                const int64_t place = of_y.find(y + (from - begin), to - from, stats.maximum);
                if (place < to - from) stats.token = from + place;
              });
            });
  return stats;
}

// How far a tile's maximum lies below the row's, in nats
inline double depth_of(float tile_max, const RowStats& stats, const VocabScan& scan) {
  return (static_cast<double>(stats.maximum) - tile_max) / scan.temperature;
}

// What one tile adds to `rest`
template <class T>
double tile_rest(const TileKernels<T>& kernels, const ScannedRow<T>& row, const VocabScan& scan,
                 const RowStats& stats, float tile_max, int64_t tile) {
  if (!(depth_of(tile_max, stats, scan) < kNegligibleDepth)) return 0;
  double rest = 0;
  row.visit(kernels, scan, tile, [&](const auto& of_y, const auto* y, int64_t begin, int64_t n) {
    for_each_range(begin, begin + n, scan.suppress, stats.token, [&](int64_t from, int64_t to) {
      rest += of_y.sum_exp(y + (from - begin), to - from, stats.maximum, scan.scale());
    });
  });
  return rest;
}

// What a scan collects from a row: first the top-1, from the maxima of the tiles, and then a sum
// per tile. Other kinds (statistics.cpp) start with the same top-1 and compute more sums.
struct Top1 {
  using Row = RowStats;
  using Tile = double;

  template <class T>
  static RowStats start(const TileKernels<T>& kernels, const ScannedRow<T>& row,
                        const VocabScan& scan, const float* tile_maxima) {
    return find_top1(kernels, row, scan, tile_maxima);
  }
  template <class T>
  static double tile(const TileKernels<T>& kernels, const ScannedRow<T>& row, const VocabScan& scan,
                     const RowStats& stats, float tile_max, int64_t tile) {
    return tile_rest(kernels, row, scan, stats, tile_max, tile);
  }
  static void add(RowStats* stats, double rest) { stats->rest += rest; }
};

// Statistics of one row on the calling thread; `tile_maxima` has room for scan.num_tiles()
template <class T, class Kind = Top1>
typename Kind::Row scan_row(const TileKernels<T>& kernels, const ScannedRow<T>& row,
                            const VocabScan& scan, float* tile_maxima) {
  const int64_t num_tiles = scan.num_tiles();
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    tile_maxima[tile] = tile_maximum(kernels, row, scan, tile);
  }
  auto stats = Kind::start(kernels, row, scan, tile_maxima);
  if (!stats.defined()) return stats;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    Kind::add(&stats, Kind::tile(kernels, row, scan, stats, tile_maxima[tile], tile));
  }
  return stats;
}

// The fewest logits worth a thread: about a third of a millisecond of work. More threads are a
// risk, since one that another process keeps from running delays the whole call by milliseconds.
constexpr int64_t kLogitsPerThread = 1 << 19;

// Calls f(begin, end) over rows of logits; each thread gets whole rows
template <class F>
void parallel_for_rows(int64_t count, int64_t vocab, const F& f) {
  parallel_for(count, (kLogitsPerThread + vocab - 1) / vocab, f);
}

// How many threads share the tiles of every row where rows are few and long. 1 where each thread
// gets whole rows: they are enough for every thread, or too few logits to share.
inline int64_t threads_per_row(int64_t count, int64_t vocab) {
  const int64_t most = num_threads();
  if (count >= 2 * most || count * vocab < 2 * kLogitsPerThread) return 1;
  return std::min(most, (count * vocab + kLogitsPerThread - 1) / kLogitsPerThread);
}

// Statistics of rows row_of(0..count): stats_of(i, stats) receives each once. row_of gives a
// ScannedRow, or the row's logits if all of its tokens are allowed.
//
// If there are enough rows for every thread, a thread takes whole rows; if they are few and long,
// all threads share the tiles of every row. Both add the same tiles in the same order, and both
// take one parallel region.
template <class T, class Kind = Top1, class RowOf, class StatsOf>
void scan_rows(int64_t count, const VocabScan& scan, const RowOf& row_of, const StatsOf& stats_of) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t num_tiles = scan.num_tiles();
  const int64_t sharing = threads_per_row(count, scan.vocab);
  if (sharing == 1) {
    parallel_for_rows(count, scan.vocab, [&](int64_t begin, int64_t end) {
      std::vector<float> tile_maxima(num_tiles);
      for (int64_t i = begin; i < end; ++i) {
        stats_of(i, scan_row<T, Kind>(kernels, row_of(i), scan.of_row(i), tile_maxima.data()));
      }
    });
    return;
  }
  std::vector<float> tile_maxima(count * num_tiles);
  std::vector<typename Kind::Tile> sums(count * num_tiles);
  std::vector<typename Kind::Row> stats(count);
  const auto find_maxima = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      tile_maxima[i] = tile_maximum<T>(kernels, row_of(i / num_tiles), scan, i % num_tiles);
    }
  };
  const auto start = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const ScannedRow<T> x = row_of(row);
      stats[row] = Kind::start(kernels, x, scan, &tile_maxima[row * num_tiles]);
    }
  };
  const auto find_sums = [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {  // what was read last is still in the cache
      const int64_t row = i / num_tiles;
      if (!stats[row].defined()) continue;
      const ScannedRow<T> x = row_of(row);
      sums[i] = Kind::tile(kernels, x, scan.of_row(row), stats[row], tile_maxima[i], i % num_tiles);
    }
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        Kind::add(&stats[row], sums[row * num_tiles + tile]);
      }
      stats_of(row, stats[row]);
    }
  };
  parallel_loops(sharing, Loop(count * num_tiles, find_maxima), Loop(count, start),
                 Loop(count * num_tiles, find_sums), Loop(count, finish));
}

}  // namespace dmax::cpu
