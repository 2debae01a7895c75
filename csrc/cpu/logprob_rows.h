// What token_logprobs reports of a row of logits; shared with the op that starts from hidden
// states.
#pragma once

#include "checks/rows.h"
#include "cpu/top_list.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {

using LogprobTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// How many tokens come before `id`: NaN first, then the larger value, then the lower id
template <class T>
int64_t rank_of(const TileKernels<T>& kernels, const ScannedRow<T>& row, const VocabScan& scan,
                int64_t id) {
  const float value = row.value(kernels, id);
  int64_t rank = 0;
  for (int64_t tile = 0; tile < scan.num_tiles(); ++tile) {
    const int64_t first = tile * kTile;
    const int64_t mine = std::clamp(id, first, std::min(scan.vocab, first + kTile));
    bool seen = false;
    row.visit(kernels, scan, tile, [&](const auto& of_y, const auto* y, int64_t begin, int64_t n) {
      seen = true;
      if (std::isnan(value)) {  // only a NaN of a lower id comes before it
        for (int64_t at = begin; at < mine; ++at) {
          at += of_y.find(y + (at - begin), mine - at, value);
          if (at < mine) ++rank;
        }
        return;
      }
      rank += of_y.count_before(y, mine - begin, value, false);
      const int64_t after = std::max(begin, id + 1) - begin;
      if (after < n) rank += of_y.count_before(y + after, n - after, value, true);
    });
    // Nothing in the tile is allowed: its logits count as -inf
    if (!seen && value == -std::numeric_limits<float>::infinity()) rank += mine - first;
  }
  return rank;
}

// The given tokens of every row, and the op's results
class LogprobRows {
 public:
  // `ids` are the op's, `tokens` the same as contiguous int64; `rows` has the rows' leading shape
  LogprobRows(const Tensor& rows, const Tensor& ids, const Tensor& tokens, int64_t per_row,
              const VocabScan& scan, int64_t top_n, int64_t ignore_index)
      : logprob_(empty_like_device(rows, sizes_of(ids), ScalarType::Float)),
        rank_(empty_like_device(rows, sizes_of(ids), ScalarType::Long)),
        top_ids_(empty_like_device(rows, list_sizes(rows, top_n), ScalarType::Long)),
        top_logprobs_(empty_like_device(rows, list_sizes(rows, top_n), ScalarType::Float)),
        logsumexp_(empty_like_device(rows, leading_sizes(rows), ScalarType::Float)),
        tokens_(tokens),
        per_row_(per_row),
        scan_(scan),
        top_n_(top_n),
        ignore_index_(ignore_index) {}

  LogprobTensors tensors() const { return {logprob_, rank_, top_ids_, top_logprobs_, logsumexp_}; }

  // Reports rows first .. first + count, whose logits are row_of(0 .. count)
  template <class T, class RowOf>
  void report(int64_t first, int64_t count, const RowOf& row_of) const {
    const TileKernels<T>& kernels = tile_kernels<T>();
    const int64_t* tokens = tokens_.const_data_ptr<int64_t>();
    float* logprob_out = static_cast<float*>(logprob_.mutable_data_ptr());
    int64_t* rank_out = static_cast<int64_t*>(rank_.mutable_data_ptr());
    int64_t* top_ids_out = static_cast<int64_t*>(top_ids_.mutable_data_ptr());
    float* top_logprobs_out = static_cast<float*>(top_logprobs_.mutable_data_ptr());
    float* logsumexp_out = static_cast<float*>(logsumexp_.mutable_data_ptr());
    scan_rows<T>(count, scan_, row_of, [&](int64_t i, const RowStats& stats) {
      const ScannedRow<T> x = row_of(i);
      const int64_t row = first + i;
      // The difference first: it is exact near the maximum, even at an offset of 1e4
      const auto logprob_of = [&](float value) {
        const double depth = (static_cast<double>(value) - stats.maximum) / scan_.temperature;
        return static_cast<float>(depth - stats.log_rest());
      };
      logsumexp_out[row] = static_cast<float>(stats.maximum / scan_.temperature + stats.log_rest());
      for (int64_t at = row * per_row_; at < (row + 1) * per_row_; ++at) {
        const bool ignored = tokens[at] == ignore_index_;
        logprob_out[at] = ignored ? 0 : logprob_of(x.value(kernels, tokens[at]));
        rank_out[at] = ignored ? -1 : rank_of(kernels, x, scan_, tokens[at]);
      }
      if (top_n_ == 0) return;
      const auto best = top_k_of_row<kMaxTopLogprobs>(kernels, x, scan_, top_n_);
      for (int64_t j = 0; j < top_n_; ++j) {
        top_ids_out[row * top_n_ + j] = best.token[j];
        top_logprobs_out[row * top_n_ + j] = logprob_of(best.logit[j]);
      }
    });
  }

 private:
  static Sizes list_sizes(const Tensor& rows, int64_t top_n) {
    Sizes sizes = leading_sizes(rows);
    sizes.push_back(top_n);
    return sizes;
  }

  Tensor logprob_, rank_, top_ids_, top_logprobs_, logsumexp_, tokens_;
  int64_t per_row_;
  VocabScan scan_;
  int64_t top_n_, ignore_index_;
};

}  // namespace dmax::cpu
