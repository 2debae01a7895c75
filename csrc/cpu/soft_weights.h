// The weights exp((x - maximum) / temperature) of a block of tokens in a block of rows.
//
// A cut limits a row to its most probable tokens. The others get no weight, and a row's sum is that
// of the weights which are left.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/row_view.h"
#include "cpu/draw_rows.h"
#include "cpu/linear_logits.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {

// Tokens per block: the weights of kSoftRows rows take 1 MiB. Over eager PyTorch, two threads of a
// Zen 4 with flat logits, V = 157,184 and D = 2,048, one run each (they differ by 0.1; for 256 rows
// bench/results has 1.01 and 0.97):
//
//   tokens                     512    1,024   2,048
//   float32, 32 rows           1.10   1.21    1.25
//   float32, 256 rows          1.05   1.16    1.17
//   bfloat16, 32 rows          1.15   1.23    1.13
//   bfloat16, 256 rows         1.03   1.11    1.13
constexpr int64_t kSoftTokens = 1024;
// A product takes over where more of a block's weights than one in this many count
constexpr int64_t kSparse = 4;

// Of a block of rows: where they start, their temperatures, their cuts if there are any, and what
// the first pass found
struct SoftRows {
  int64_t first;
  int64_t count;
  std::vector<double> temperature;
  const Cut* cuts;  // nullptr: all tokens are kept
  bool rounds;      // the weights of dense blocks, to bfloat16
  std::vector<RowStats> stats;
};

// The weights of one block of tokens that count, and whose they are
struct BlockWeights {
  std::vector<float> weight;      // [rows, tokens that count]
  std::vector<int64_t> tokens;    // ascending
  bool dense;                     // worth a product
  std::vector<BFloat16> rounded;  // the weights of a dense block where SoftRows::rounds is set

  float* row(int64_t i) { return weight.data() + i * kSoftTokens; }
  const float* row(int64_t i) const { return weight.data() + i * kSoftTokens; }
};

// The cuts of all rows; empty where none are given
inline std::vector<Cut> cuts_of(int64_t rows, const OptionalTensor& least,
                                const OptionalTensor& last_id) {
  std::vector<Cut> cuts;
  if (!least) return cuts;
  const Tensor values = as_contiguous(*least);
  const Tensor ids = as_contiguous(*last_id);
  for (int64_t i = 0; i < rows; ++i) {
    cuts.push_back({values.const_data_ptr<float>()[i], ids.const_data_ptr<int64_t>()[i]});
  }
  return cuts;
}

// A row of which the cut keeps nothing has what one of nothing but -inf has. With a cut, or with
// rounded weights, a row's weights are still to be added to the maximum's own, which is 1.
inline void apply_cuts(SoftRows* rows) {
  if (!rows->cuts && !rows->rounds) return;
  for (int64_t i = 0; i < rows->count; ++i) {
    RowStats& stats = rows->stats[i];
    const Cut cut = rows->cuts ? rows->cuts[i] : Cut{};
    const bool nothing =
        stats.maximum < cut.value || (stats.maximum == cut.value && stats.token > cut.last_id);
    if (nothing) stats = {};
    stats.rest = -1;
  }
}

template <class T>
void find_maxima(const RowView& logits, SoftRows* rows) {
  const T* data = static_cast<const T*>(logits.tensor.const_data_ptr());
  rows->stats.resize(rows->count);
  scan_rows<T>(
      rows->count, VocabScan{logits.width, -1, 1.0, rows->temperature.data()},
      [&](int64_t i) { return data + (rows->first + i) * logits.row_stride; },
      [&](int64_t i, const RowStats& stats) { rows->stats[i] = stats; });
}

// The weights of tokens [first, first + n) of a row; of those that the cut drops, 0
template <class T>
void weigh_kept(const VisibleRow<T>& logits, const Cut& cut, const RowStats& stats, float scale,
                int64_t first, int64_t n, float* weight) {
  float kept[kSoftTokens];
  load_kept(logits, first, n, cut, kept);
  tile_kernels<float>().weigh(kept, weight, n, stats.maximum, scale);
}

// Rounds the weights of a dense block, and adds what they then are to the rows' sums
inline void sum_rounded(SoftRows* rows, BlockWeights* block) {
  const int64_t used = static_cast<int64_t>(block->tokens.size());
  if (used == 0) return;
  block->rounded.resize(rows->count * kSoftTokens);
  constexpr int64_t kGrain = 1 << 16;  // weights per thread
  parallel_for(rows->count, kGrain / used, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (block->dense) {
        BFloat16* rounded = block->rounded.data() + i * kSoftTokens;
        tile_kernels<BFloat16>().store_scaled(rounded, block->row(i), 1.0f, used);
        rows->stats[i].rest += tile_kernels<BFloat16>().sum(rounded, used, 0.0f);
      } else {
        rows->stats[i].rest += tile_kernels<float>().sum(block->row(i), used, 0.0f);
      }
    }
  });
}

template <class T>
void weigh_block(const RowView& logits, SoftRows* all_rows, int64_t first, int64_t n,
                 BlockWeights* block) {
  SoftRows& rows = *all_rows;
  const TileKernels<T>& kernels = tile_kernels<T>();
  const T* data = static_cast<const T*>(logits.tensor.const_data_ptr());
  constexpr int64_t kGrain = 1 << 14;  // exponentials per thread
  parallel_for(rows.count, kGrain / n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowStats& stats = rows.stats[i];
      const T* x = data + (rows.first + i) * logits.row_stride;
      const float scale = softmax_scale(rows.temperature[i]);
      if (!stats.defined()) {
        std::fill_n(block->row(i), n, 0.0f);
      } else if (!rows.cuts) {
        kernels.weigh(x + first, block->row(i), n, stats.maximum, scale);
      } else {
        float* weight = block->row(i);
        weigh_kept(VisibleRow<T>{x, logits.width, -1, nullptr}, rows.cuts[i], stats, scale, first,
                   n, weight);
        if (!rows.rounds) stats.rest += std::accumulate(weight, weight + n, 0.0);
      }
    }
  });
  float largest[kSoftTokens] = {};
  for (int64_t i = 0; i < rows.count; ++i) {
    const float* weight = block->row(i);
    for (int64_t t = 0; t < n; ++t) largest[t] = std::max(largest[t], weight[t]);
  }
  block->tokens.clear();
  for (int64_t t = 0; t < n; ++t) {
    if (largest[t] > 0) block->tokens.push_back(t);
  }
  const int64_t used = static_cast<int64_t>(block->tokens.size());
  int64_t nonzero = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    float* weight = block->row(i);
    if (used < n) {
      for (int64_t j = 0; j < used; ++j) weight[j] = weight[block->tokens[j]];
    }
    for (int64_t j = 0; j < used; ++j) nonzero += weight[j] > 0;
  }
  block->dense = rows.count > kFewRows && nonzero * kSparse > rows.count * used;
  if (rows.rounds) sum_rounded(&rows, block);
}

}  // namespace dmax::cpu
