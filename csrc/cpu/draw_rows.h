// The draws of many rows, on several threads.
#pragma once

#include "cpu/draw_filters.h"

namespace dmax::cpu {

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
  const int64_t sharing = threads_per_row(count, vocab);
  if (sharing == 1) {
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
  std::vector<float> memory(count * floats);
  std::vector<RowDraw<T>> rows;
  rows.reserve(count);
  for (int64_t i = 0; i < count; ++i) rows.push_back(row_in(i, &memory[i * floats]));
  const auto find_maxima = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rows[i / tiles].find_maxima(i % tiles);
  };
  const auto find_maximum = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rows[i].find_maximum();
  };
  const auto add_masses = [&](int64_t begin, int64_t end) {
    // Backwards: what was read last is still in the cache
    for (int64_t i = end - 1; i >= begin; --i) rows[i / tiles].add_masses(i % tiles);
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    DrawScratch scratch(vocab);
    for (int64_t i = begin; i < end; ++i) {
      rows[i].total = rows[i].total_mass();
      done(i, rows[i], &scratch);
    }
  };
  parallel_loops(sharing, Loop(count * tiles, find_maxima), Loop(count, find_maximum),
                 Loop(count * tiles, add_masses), Loop(count, finish));
}

}  // namespace dmax::cpu
