// The k largest logits of a row; shared by topk_confidence, token_logprobs and the top-k embeddings
// of spd_step_.
#pragma once

#include "checks/rows.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {

// In descending order, NaN first, equal values by ascending id
template <int kMost>
struct TopList {
  int64_t size = 0;
  int64_t token[kMost];
  float logit[kMost];

  static bool before(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

  // Ids arrive in ascending order, so an equal value goes after those already here
  void insert(int64_t k, int64_t id, float value) {
    if (size == k && !before(value, logit[k - 1])) return;
    int64_t place = size < k ? size++ : k - 1;
    for (; place > 0 && before(value, logit[place - 1]); --place) {
      token[place] = token[place - 1];
      logit[place] = logit[place - 1];
    }
    token[place] = id;
    logit[place] = value;
  }
};

using TopK = TopList<kMaxTopK>;

template <int kMost = kMaxTopK, class T>
TopList<kMost> top_k_of_row(const TileKernels<T>& kernels, const ScannedRow<T>& row,
                            const VocabScan& scan, int64_t k) {
  TopList<kMost> best;
  // A hidden token ranks as -inf, so it can be listed if fewer than k others exceed that
  for (int64_t id = 0; id < k; ++id) {
    const bool suppressed = id == scan.suppress;
    best.insert(k, id,
                suppressed ? -std::numeric_limits<float>::infinity() : row.value(kernels, id));
  }
  // The logits y of the tokens from `begin` on
  const auto list = [&](const auto& of_y, const auto* y, int64_t begin, int64_t n) {
    const int64_t first = std::max(begin, k);
    for_each_range(first, begin + n, scan.suppress, -1, [&](int64_t from, int64_t to) {
      while (from < to) {
        // Nothing ranks above NaN, so a NaN at the end of the list cannot be displaced
        if (std::isnan(best.logit[k - 1])) return;
        from += of_y.find_above(y + (from - begin), to - from, best.logit[k - 1]);
        if (from >= to) return;
        best.insert(k, from, of_y.value(y + (from - begin)));
        ++from;
      }
    });
  };
  if (row.words) {
    for (int64_t tile = 0; tile < scan.num_tiles(); ++tile) row.visit(kernels, scan, tile, list);
  } else {
    list(kernels, row.x, 0, scan.vocab);
  }
  return best;
}

// exp((x - lse) / temperature) of each; all NaN if the row's softmax is not defined
inline void top_k_confidences(const TopK& best, const RowStats& stats, const VocabScan& scan,
                              int64_t k, int64_t* tokens, float* confidences) {
  for (int64_t j = 0; j < k; ++j) {
    tokens[j] = best.token[j];
    confidences[j] = stats.probability(best.logit[j], scan.temperature);
  }
}

}  // namespace dmax::cpu
