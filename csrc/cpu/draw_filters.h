// The filters of a draw: top_k, top_p and min_p, exactly and without sorting a row.
//
// Each filter keeps the first tokens in one order, by descending logit and then by ascending id.
// What they keep together is therefore everything up to one token, the cut. min_p's is a threshold.
// Those of top_k and top_p end the shortest prefix with so many tokens, or with so much mass. On
// most rows it lies among few candidates: the tokens from the threshold on that the maxima of the
// draw tiles give, which are there anyway. On others, a histogram of the row's values with the
// amount in each bucket comes first, and the candidates are the tokens of one bucket.
#pragma once

#include <functional>
#include <memory>

#include "common/draw_options.h"
#include "cpu/row_draw.h"

namespace dmax::cpu {

// Bits that sort as their values do; -0 equals 0
inline uint32_t sortable_bits(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Tokens with a logit, an id and an amount each, by ascending id
struct Candidates {
  int64_t count = 0;
  int64_t capacity = 0;
  std::unique_ptr<float[]> values;
  std::unique_ptr<int32_t[]> ids;
  std::unique_ptr<float[]> amounts;

  // Drops what is there and makes room for `most`
  void clear(int64_t most) {
    constexpr int64_t kPadding = 16;  // the kernels write whole vectors
    count = 0;
    if (capacity >= most) return;
    capacity = most;
    values.reset(new float[most + kPadding]);
    ids.reset(new int32_t[most + kPadding]);
    amounts.reset(new float[most + kPadding]);
  }

  // Leaves those whose value keep() accepts
  template <class Keep>
  void filter(const Keep& keep) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      values[kept] = values[i];
      ids[kept] = ids[i];
      amounts[kept] = amounts[i];
      kept += keep(values[i]);
    }
    count = kept;
  }
};

constexpr int kBuckets = 2048;

// Memory that the rows of a thread share
struct FilterScratch {
  Candidates candidates;
  std::vector<float> maxima;
  double amounts[kBuckets];
};

// The bucket of the shortest prefix of buckets that adds up to `target`, the last one with anything
// if none does. `before` becomes what the buckets in front of it add up to.
inline int find_bucket(const double* amounts, int buckets, double target, double* before) {
  int found = 0;
  double beside = 0;
  for (int bucket = 0; bucket < buckets; ++bucket) {
    if (amounts[bucket] == 0) continue;
    *before += beside;
    found = bucket;
    beside = amounts[bucket];
    if (*before + beside >= target) break;
  }
  return found;
}

// The last token of the shortest prefix of the candidates that adds up to `target`, the very last
// one if they do not, where all tokens in front of the candidates add up to `before`. There is at
// least one candidate. The value's bits separate them, eight at a time, from the highest on.
inline Cut find_cut(FilterScratch* scratch, double target, double before) {
  Candidates& candidates = scratch->candidates;
  double* amounts = scratch->amounts;
  for (int shift = 24; shift >= 0; shift -= 8) {
    constexpr int kDigits = 256;
    const auto digit = [=](float x) { return ~sortable_bits(x) >> shift & (kDigits - 1); };
    std::fill_n(amounts, kDigits, 0.0);
    for (int64_t i = 0; i < candidates.count; ++i) {
      amounts[digit(candidates.values[i])] += candidates.amounts[i];
    }
    const uint32_t found = find_bucket(amounts, kDigits, target, &before);
    candidates.filter([=](float x) { return digit(x) == found; });
  }
  int64_t last = 0;  // all that are left are equal
  for (; last + 1 < candidates.count; ++last) {
    before += candidates.amounts[last];
    if (before >= target) break;
  }
  return {candidates.values[last], candidates.ids[last]};
}

// The rank-th largest maximum of a draw tile, which at least so many tokens reach; -inf if there
// are fewer tiles
template <class T>
float tile_threshold(const RowDraw<T>& row, int64_t rank, FilterScratch* scratch) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float>& maxima = scratch->maxima;
  const auto nth_largest = [&] {
    const auto place = maxima.begin() + (rank - 1);
    std::nth_element(maxima.begin(), place, maxima.end(), std::greater<float>());
    return *place;
  };
  if (rank > row.num_draw_tiles()) return -kInfinity;
  // The same rank among the maxima of the large tiles leaves few draw tiles to choose from
  float least = -kInfinity;
  if (rank <= row.row.num_tiles()) {
    maxima.assign(row.of_tiles, row.of_tiles + row.row.num_tiles());
    least = nth_largest();
  }
  maxima.clear();
  row.for_each_run(least, [&](int64_t begin, int64_t n) {
    const float* first = row.maxima + begin / kDrawTile;
    maxima.insert(maxima.end(), first, first + num_draw_tiles(n));
  });
  return nth_largest();
}

// Makes the tokens from `threshold` on the candidates. The amount of a token is
// 2^((x - maximum) * amount_scale), which is 1 at scale 0. Returns the sum.
template <class T>
double collect_candidates(const RowDraw<T>& row, float threshold, float amount_scale,
                          FilterScratch* scratch) {
  Candidates& out = scratch->candidates;
  int64_t tiles = 0;
  row.for_each_run(threshold, [&](int64_t, int64_t n) { tiles += n / kDrawTile + 1; });
  out.clear(tiles * kDrawTile);
  row.for_each_run(threshold, [&](int64_t begin, int64_t n) {
    float buffer[kTile];
    row.row.visit(begin, n, buffer, [&](const auto* x, int64_t) {
      out.count += draw_kernels_of(x).collect(x, n, threshold, static_cast<int32_t>(begin),
                                              &out.values[out.count], &out.ids[out.count]);
    });
  });
  race_kernels().weights(out.values.get(), out.amounts.get(), out.count, row.maximum, amount_scale);
  double sum = 0;
  for (int64_t i = 0; i < out.count; ++i) sum += out.amounts[i];
  return sum;
}

// Amounts as above. Tokens below `least` are known not to be needed.
template <class T>
Cut find_prefix(const RowDraw<T>& row, double target, float amount_scale, float least,
                FilterScratch* scratch) {
  // Ranks of the threshold: that of a peaked row, and one for a few hundred probable tokens
  const bool counts = amount_scale == 0;
  for (int64_t rank : {counts ? static_cast<int64_t>(target) : int64_t{48}, int64_t{512}}) {
    const float threshold = std::max(tile_threshold(row, rank, scratch), least);
    if (threshold == -std::numeric_limits<float>::infinity()) break;
    const double sum = collect_candidates(row, threshold, amount_scale, scratch);
    if (sum >= target || threshold == least) return find_cut(scratch, target, 0);
  }

  // Buckets of one width, the last of which has no end. Three times the distance to the lowest
  // maximum of a tile covers nearly all tokens of a row without structure.
  constexpr float kMost = std::numeric_limits<float>::max();
  constexpr float kLeast = std::numeric_limits<float>::min();
  float lowest = row.maximum;
  for (int64_t tile = 0; tile < row.num_draw_tiles(); ++tile) {
    if (std::isfinite(row.maxima[tile])) lowest = std::min(lowest, row.maxima[tile]);
  }
  const float width = std::min(3 * (row.maximum - lowest), row.maximum - least);
  const float per_unit = std::min(std::max((kBuckets - 1) / width, kLeast), kMost);
  std::fill_n(scratch->amounts, kBuckets, 0.0);
  row.for_each_run(-kMost, [&](int64_t begin, int64_t n) {
    float buffer[kTile];
    row.row.visit(begin, n, buffer, [&](const auto* x, int64_t) {
      draw_kernels_of(x).histogram(x, n, row.maximum, amount_scale, per_unit, kBuckets,
                                   scratch->amounts);
    });
  });
  double before = 0;
  const int bucket = find_bucket(scratch->amounts, kBuckets, target, &before);
  Candidates& out = scratch->candidates;
  out.clear(row.row.vocab);
  row.for_each_run(-kMost, [&](int64_t begin, int64_t n) {
    float buffer[kTile];
    row.row.visit(begin, n, buffer, [&](const auto* x, int64_t) {
      out.count += draw_kernels_of(x).collect_bucket(x, n, row.maximum, per_unit, kBuckets, bucket,
                                                     static_cast<int32_t>(begin),
                                                     &out.values[out.count], &out.ids[out.count]);
    });
  });
  race_kernels().weights(out.values.get(), out.amounts.get(), out.count, row.maximum, amount_scale);
  return find_cut(scratch, target, before);
}

// What of the row's tokens the filters keep; the row's masses become those of what is kept
template <class T>
Cut filter_row(const RowDraw<T>& row, const DrawOptions& options, FilterScratch* scratch) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float min_p = static_cast<float>(options.min_p);
  const float top_p = static_cast<float>(options.top_p);
  Cut cut;
  double mass = row.total;
  if (options.top_k > 0 && options.top_k < static_cast<double>(row.row.vocab)) {
    cut = find_prefix(row, options.top_k, 0, -kInfinity, scratch);
    row.keep(cut);
    if (min_p <= 0 && top_p >= 1) return cut;
    mass = row.total_mass();
  }
  if (min_p > 0) {
    const double threshold =
        row.maximum + options.temperature * std::log(static_cast<double>(min_p));
    float value = static_cast<float>(threshold);  // the smallest float32 that is not below it
    if (value < threshold) value = std::nextafter(value, kInfinity);
    cut = stricter(cut, {value});
  }
  if (top_p < 1) {
    // Tokens deeper than this have less than 1e-8 of the mass together, and top_p is at most
    // 1 - 6e-8; those that are dropped already do not matter either
    constexpr double kNoMassDepth = 40;
    const float deepest = static_cast<float>(row.maximum - kNoMassDepth * options.temperature);
    const float least = std::max(cut.value, deepest);
    cut = stricter(cut, find_prefix(row, top_p * mass, row.scale(), least, scratch));
  }
  row.keep(cut);
  return cut;
}

}  // namespace dmax::cpu
