// Log-probabilities and ranks of given tokens, and the most likely tokens beside them.
#include "checks/rows.h"
#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/cross_entropy.h"
#include "cpu/top_list.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {

namespace {

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

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor ids,
                                                                  double temperature, int64_t top_n,
                                                                  int64_t ignore_index,
                                                                  OptionalTensor allowed) {
  constexpr const char* op = "token_logprobs";
  const auto [vocab, per_row] =
      check_token_logprobs(logits, ids, temperature, top_n, ignore_index, allowed);
  const AllowedMask mask(allowed, vocab);
  const Tensor tokens = checked_targets(op, ids, vocab, ignore_index, "ids");
  Sizes list_sizes = leading_sizes(logits);
  list_sizes.push_back(top_n);
  Tensor logprob = empty_like_device(logits, sizes_of(ids), ScalarType::Float);
  Tensor rank = empty_like_device(logits, sizes_of(ids), ScalarType::Long);
  Tensor top_ids = empty_like_device(logits, list_sizes, ScalarType::Long);
  Tensor top_logprobs = empty_like_device(logits, list_sizes, ScalarType::Float);
  Tensor logsumexp = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  const RowView view = row_view(logits);
  const int64_t* token_data = tokens.const_data_ptr<int64_t>();
  float* logprob_out = logprob.mutable_data_ptr<float>();
  int64_t* rank_out = rank.mutable_data_ptr<int64_t>();
  int64_t* top_ids_out = top_ids.mutable_data_ptr<int64_t>();
  float* top_logprobs_out = top_logprobs.mutable_data_ptr<float>();
  float* logsumexp_out = logsumexp.mutable_data_ptr<float>();

  dispatch_float(logits.scalar_type(), [&, vocab = vocab, per_row = per_row](auto element) {
    using T = decltype(element);
    const TileKernels<T>& kernels = tile_kernels<T>();
    const VocabScan scan{vocab, -1, temperature};
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t row) {
      return ScannedRow<T>(data + row * view.row_stride, mask.row(row));
    };
    scan_rows<T>(view.rows, scan, row_of, [&](int64_t row, const RowStats& stats) {
      const ScannedRow<T> x = row_of(row);
      // The difference first: it is exact near the maximum, even at an offset of 1e4
      const auto logprob_of = [&](float value) {
        const double depth = (static_cast<double>(value) - stats.maximum) / temperature;
        return static_cast<float>(depth - stats.log_rest());
      };
      logsumexp_out[row] = static_cast<float>(stats.maximum / temperature + stats.log_rest());
      for (int64_t at = row * per_row; at < (row + 1) * per_row; ++at) {
        const int64_t id = token_data[at];
        const bool ignored = id == ignore_index;
        logprob_out[at] = ignored ? 0 : logprob_of(x.value(kernels, id));
        rank_out[at] = ignored ? -1 : rank_of(kernels, x, scan, id);
      }
      if (top_n == 0) return;
      const auto best = top_k_of_row<kMaxTopLogprobs>(kernels, x, scan, top_n);
      for (int64_t j = 0; j < top_n; ++j) {
        top_ids_out[row * top_n + j] = best.token[j];
        top_logprobs_out[row * top_n + j] = logprob_of(best.logit[j]);
      }
    });
  });
  return {logprob, rank, top_ids, top_logprobs, logsumexp};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&dmax::cpu::token_logprobs));
}
