// The filters of a draw: top_k, top_p and min_p, exactly and without sorting.
//
// Each filter keeps the first tokens in one order, by descending logit and then by ascending id.
// What they keep together is therefore everything up to one token, the cut. It is looked for among
// candidates, all tokens from a threshold on: the maxima of the draw tiles, which are there anyway,
// give one that has enough tokens above it and, on most rows, few. Among the candidates the cut is
// found by counting tokens, or adding their probabilities, per bucket of values.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "common/draw_options.h"
#include "common/softmax_stats.h"
#include "cpu/visible_row.h"

namespace dmax::cpu {

// Kept are the logits above `value`, and those equal to it up to `last_id`
struct Cut {
  float value = -std::numeric_limits<float>::infinity();
  int64_t last_id = std::numeric_limits<int64_t>::max();

  bool keeps(float x, int64_t id) const { return x > value || (x == value && id <= last_id); }
};

inline Cut stricter(const Cut& a, const Cut& b) {
  if (a.value != b.value) return a.value > b.value ? a : b;
  return a.last_id < b.last_id ? a : b;
}

// Bits that sort as their values do; -0 equals 0
inline uint32_t sortable_bits(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Tokens with a logit, an id and a weight each, by ascending id
struct Candidates {
  int64_t count = 0;
  std::unique_ptr<float[]> values;
  std::unique_ptr<int32_t[]> ids;
  std::unique_ptr<float[]> weights;  // 2^((value - the row's maximum) * scale), where needed

  void reserve(int64_t most) {
    constexpr int64_t kPadding = 16;  // collect() writes whole vectors
    if (values) return;
    values.reset(new float[most + kPadding]);
    ids.reset(new int32_t[most + kPadding]);
    weights.reset(new float[most + kPadding]);
  }

  // Becomes those of `from`, which may be itself, for whose index keep() holds
  template <class Keep>
  void take(const Candidates& from, const Keep& keep) {
    int64_t kept = 0;
    for (int64_t i = 0; i < from.count; ++i) {
      if (!keep(i)) continue;
      values[kept] = from.values[i];
      ids[kept] = from.ids[i];
      weights[kept++] = from.weights[i];
    }
    count = kept;
  }
};

// The last token of the shortest prefix of the candidates, in the order of the filters, whose
// amounts add up to `target`; the very last one if they do not. The amount of a token is its weight,
// or 1 to count. There is at least one candidate; `left` is memory for as many.
template <bool kWeights>
Cut find_cut(const Candidates& candidates, double target, Candidates* left) {
  constexpr int kMostBuckets = 2048;
  std::array<double, kMostBuckets> amounts;
  const Candidates* from = &candidates;
  const auto amount = [&](int64_t i) { return kWeights ? from->weights[i] : 1.0f; };
  double before = 0;  // what the larger ones that are not in `from` any more add up to
  // Keeps the bucket in which the target is reached. Bucket 0 holds the largest values.
  const auto narrow = [&](int buckets, const auto& bucket_of) {
    std::fill_n(amounts.begin(), buckets, 0.0);
    for (int64_t i = 0; i < from->count; ++i) amounts[bucket_of(from->values[i])] += amount(i);
    int last = 0;
    double beside = 0;
    for (int bucket = 0; bucket < buckets; ++bucket) {
      if (amounts[bucket] == 0) continue;
      before += beside;
      last = bucket;
      beside = amounts[bucket];
      if (before + beside >= target) break;
    }
    left->take(*from, [&](int64_t i) { return bucket_of(from->values[i]) == last; });
    from = left;
  };

  // Buckets of one width spread the values of most rows well. Those of the bits, eight at a time,
  // then separate any two values.
  constexpr int64_t kFew = 512;
  if (candidates.count > kFew) {
    const float* values = candidates.values.get();
    const auto range = std::minmax_element(values, values + candidates.count);
    const float most = *range.second, width = most - *range.first;
    const float buckets_per_unit = (kMostBuckets - 1) / width;
    if (std::isfinite(width) && std::isfinite(buckets_per_unit)) {
      narrow(kMostBuckets,
             [=](float x) { return static_cast<int>((most - x) * buckets_per_unit); });
    }
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    narrow(256, [=](float x) { return static_cast<int>(~sortable_bits(x) >> shift & 0xff); });
  }
  int64_t last = 0;  // all that are left are equal
  for (; last + 1 < from->count; ++last) {
    before += amount(last);
    if (before >= target) break;
  }
  return {from->values[last], from->ids[last]};
}

// What the filters need to know of a row; ids count from the row's first token
template <class T>
struct FilteredRow {
  const VisibleRow<T>& row;
  const float* maxima;  // of the draw tiles
  float maximum;        // of the row, which is finite
  double total;         // sum of all weights
  float scale;
};

// Memory that the rows of a thread share
struct FilterScratch {
  Candidates candidates, left;
  std::vector<float> sorted;
};

template <class T>
void collect_from(const FilteredRow<T>& row, float threshold, Candidates* out) {
  const int64_t tiles = (row.row.vocab + kDrawTile - 1) / kDrawTile;
  constexpr int64_t kTilesAtOnce = kTile / kDrawTile;
  out->count = 0;
  for (int64_t tile = 0; tile < tiles;) {
    int64_t end = tile;  // of a run of tiles with candidates
    while (end < tiles && end - tile < kTilesAtOnce && row.maxima[end] >= threshold) ++end;
    if (end == tile) {
      ++tile;
      continue;
    }
    const int64_t begin = tile * kDrawTile;
    float buffer[kTile];
    row.row.visit(begin, std::min(end * kDrawTile, row.row.vocab) - begin, buffer,
                  [&](const auto* x, int64_t n) {
                    using Element = std::decay_t<decltype(*x)>;
                    out->count += draw_kernels<Element>().collect(
                        x, n, threshold, static_cast<int32_t>(begin),
                        out->values.get() + out->count, out->ids.get() + out->count);
                  });
    tile = end;
  }
}

// The rank-th largest maximum of a draw tile: at least so many tokens are not below it
template <class T>
float tile_threshold(const FilteredRow<T>& row, int64_t rank, FilterScratch* scratch) {
  const int64_t tiles = (row.row.vocab + kDrawTile - 1) / kDrawTile;
  if (rank > tiles) return -std::numeric_limits<float>::infinity();
  scratch->sorted.assign(row.maxima, row.maxima + tiles);
  const auto place = scratch->sorted.begin() + (rank - 1);
  std::nth_element(scratch->sorted.begin(), place, scratch->sorted.end(), std::greater<float>());
  return *place;
}

inline double add_weights(Candidates* candidates, float maximum, float scale) {
  race_kernels().weights(candidates->values.get(), candidates->weights.get(), candidates->count,
                         maximum, scale);
  double sum = 0;
  for (int64_t i = 0; i < candidates->count; ++i) sum += candidates->weights[i];
  return sum;
}

// What of the row's tokens the filters keep
template <class T>
Cut filter_row(const FilteredRow<T>& row, const DrawOptions& options, FilterScratch* scratch) {
  Cut cut;
  const float min_p = static_cast<float>(options.min_p);
  const float top_p = static_cast<float>(options.top_p);
  if (min_p > 0) {  // a threshold: the smallest float32 that is not below it
    const double least = row.maximum + options.temperature * std::log(static_cast<double>(min_p));
    cut.value = static_cast<float>(least);
    if (cut.value < least) {
      cut.value = std::nextafter(cut.value, std::numeric_limits<float>::infinity());
    }
  }
  Candidates& candidates = scratch->candidates;
  candidates.reserve(row.row.vocab);
  scratch->left.reserve(row.row.vocab);
  double mass = row.total;
  const bool top_k = options.top_k > 0 && options.top_k < static_cast<double>(row.row.vocab);
  if (top_k) {
    const int64_t k = static_cast<int64_t>(options.top_k);
    Cut largest{tile_threshold(row, k, scratch)};
    collect_from(row, largest.value, &candidates);
    if (candidates.count > k) {
      largest = find_cut<false>(candidates, static_cast<double>(k), &scratch->left);
      candidates.take(candidates, [&](int64_t i) {
        return largest.keeps(candidates.values[i], candidates.ids[i]);
      });
    }
    cut = stricter(cut, largest);
  }
  if (top_p >= 1) return cut;

  if (top_k) {
    mass = add_weights(&candidates, row.maximum, row.scale);
  } else {
    // Tokens deeper than this have less than 1e-8 of the mass together, and top_p is at most
    // 1 - 6e-8. Tokens that min_p drops are not needed either.
    constexpr double kNoMassDepth = 40;
    const float deepest = static_cast<float>(row.maximum - kNoMassDepth * options.temperature);
    const float least = std::max(cut.value, deepest);
    // Few candidates do where the row is peaked
    for (int64_t rank : {int64_t{32}, int64_t{256}, int64_t{0}}) {
      const float threshold = rank == 0 ? least : tile_threshold(row, rank, scratch);
      collect_from(row, std::max(threshold, least), &candidates);
      if (add_weights(&candidates, row.maximum, row.scale) >= top_p * mass) break;
      if (threshold <= least) break;
    }
  }
  return stricter(cut, find_cut<true>(candidates, top_p * mass, &scratch->left));
}

}  // namespace dmax::cpu
