// The most probable tokens of rows of logits: whole rows, shards of them, and the merge of shards.
#include "checks/rows.h"
#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/shard_merge.h"
#include "cpu/top_list.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor> top1_confidence(Tensor logits, double temperature,
                                           int64_t suppress_token, OptionalTensor allowed) {
  const int64_t vocab = check_top1_confidence(logits, temperature, suppress_token, allowed);
  const AllowedMask mask(allowed, vocab);
  Tensor token = empty_like_device(logits, leading_sizes(logits), ScalarType::Long);
  Tensor confidence = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  const RowView view = row_view(logits);
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    scan_rows<T>(
        view.rows, {vocab, suppress_token, temperature},
        [&](int64_t row) { return ScannedRow<T>(data + row * view.row_stride, mask.row(row)); },
        [&](int64_t row, const RowStats& stats) {
          token_out[row] = stats.token;
          confidence_out[row] = stats.confidence();
        });
  });
  return {token, confidence};
}

std::tuple<Tensor, Tensor> topk_confidence(Tensor logits, int64_t k, double temperature,
                                           int64_t suppress_token, OptionalTensor allowed) {
  const int64_t vocab = check_topk_confidence(logits, k, temperature, suppress_token, allowed);
  const AllowedMask mask(allowed, vocab);
  Sizes out_sizes = leading_sizes(logits);
  out_sizes.push_back(k);
  Tensor tokens = empty_like_device(logits, out_sizes, ScalarType::Long);
  Tensor confidences = empty_like_device(logits, out_sizes, ScalarType::Float);
  const RowView view = row_view(logits);
  int64_t* tokens_out = tokens.mutable_data_ptr<int64_t>();
  float* confidences_out = confidences.mutable_data_ptr<float>();

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const VocabScan scan{vocab, suppress_token, temperature};
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t row) {
      return ScannedRow<T>(data + row * view.row_stride, mask.row(row));
    };
    scan_rows<T>(view.rows, scan, row_of, [&](int64_t row, const RowStats& stats) {
      const TopK best = top_k_of_row(tile_kernels<T>(), row_of(row), scan, k);
      top_k_confidences(best, stats, scan, k, tokens_out + row * k, confidences_out + row * k);
    });
  });
  return {tokens, confidences};
}

std::tuple<Tensor, Tensor, Tensor> top1_partial(Tensor logits_shard, int64_t vocab_start,
                                                double temperature, int64_t suppress_token,
                                                OptionalTensor allowed) {
  const auto sizes =
      check_top1_partial(logits_shard, vocab_start, temperature, suppress_token, allowed);
  const AllowedMask mask(allowed, sizes.vocab);
  const Sizes out_sizes = leading_sizes(logits_shard);
  Tensor maximum = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor token = empty_like_device(logits_shard, out_sizes, ScalarType::Long);
  const RowView view = row_view(logits_shard);
  float* maximum_out = maximum.mutable_data_ptr<float>();
  float* sum_exp_out = sum_exp.mutable_data_ptr<float>();
  int64_t* token_out = token.mutable_data_ptr<int64_t>();

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    scan_rows<T>(
        view.rows, {sizes.vocab, sizes.local_suppress, temperature},
        [&](int64_t row) { return ScannedRow<T>(data + row * view.row_stride, mask.row(row)); },
        [&](int64_t row, const RowStats& stats) {
          const bool empty = stats.maximum == -std::numeric_limits<float>::infinity();
          maximum_out[row] = stats.maximum;
          sum_exp_out[row] = empty ? 0.0f : static_cast<float>(stats.sum_exp());
          token_out[row] = vocab_start + stats.token;
        });
  });
  return {maximum, sum_exp, token};
}

std::tuple<Tensor, Tensor> top1_merge(Tensor maximum, Tensor sum_exp, Tensor token,
                                      double temperature) {
  const auto sizes = check_top1_merge(maximum, sum_exp, token, temperature);
  const Sizes out_sizes(maximum.sizes().begin() + 1, maximum.sizes().end());
  Tensor merged = empty_like_device(maximum, out_sizes, ScalarType::Long);
  Tensor confidence = empty_like_device(maximum, out_sizes, ScalarType::Float);
  const Tensor maximum_c = as_contiguous(maximum);
  const Tensor sum_exp_c = as_contiguous(sum_exp);
  const Tensor token_c = as_contiguous(token);
  int64_t* merged_out = merged.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();

  const ShardRows shards{sizes.shards,
                         sizes.rows,
                         maximum_c.const_data_ptr<float>(),
                         sum_exp_c.const_data_ptr<float>(),
                         token_c.const_data_ptr<int64_t>(),
                         temperature};
  for_each_merged_row(shards, [&](int64_t row) {
    const int64_t best = shards.winner(shards.maxima, row);
    const double total = shards.total(row, shards.maxima[best]);
    merged_out[row] = shards.tokens[best];
    confidence_out[row] =
        total == 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(1.0 / total);
  });
  return {merged, confidence};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("top1_confidence", TORCH_BOX(&dmax::cpu::top1_confidence));
  m.impl("topk_confidence", TORCH_BOX(&dmax::cpu::topk_confidence));
  m.impl("top1_partial", TORCH_BOX(&dmax::cpu::top1_partial));
  m.impl("top1_merge", TORCH_BOX(&dmax::cpu::top1_merge));
}
