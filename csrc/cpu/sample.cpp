// One sampled token per row of logits: whole rows, shards of them, and the merge of shards.
#include "checks/rows.h"
#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/draw_rows.h"
#include "cpu/sample_results.h"
#include "cpu/shard_merge.h"

namespace dmax::cpu {

SampleTensors sample_tokens(Tensor logits, Tensor seed, double temperature, int64_t top_k,
                            double top_p, double min_p, OptionalTensor row_options,
                            int64_t suppress_token, OptionalTensor allowed) {
  const int64_t vocab = check_sample_tokens(logits, seed, temperature, top_k, top_p, min_p,
                                            row_options, suppress_token, allowed);
  const SampleResults results(logits);
  const RowView view = row_view(logits);
  const DrawArguments arguments(seed, {temperature, static_cast<double>(top_k), top_p, min_p},
                                row_options, allowed, vocab);
  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    sample_rows<T>(view.rows, arguments, results, 0, vocab, [&](int64_t row) {
      return VisibleRow<T>{data + row * view.row_stride, vocab, suppress_token,
                           arguments.allowed(row)};
    });
  });
  return results.tensors();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_partial(Tensor logits_shard, Tensor seed,
                                                                  int64_t vocab_start,
                                                                  double temperature,
                                                                  int64_t suppress_token) {
  const auto sizes =
      check_sample_partial(logits_shard, seed, vocab_start, temperature, suppress_token);
  const Sizes out_sizes = leading_sizes(logits_shard);
  Tensor maximum = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor token = empty_like_device(logits_shard, out_sizes, ScalarType::Long);
  Tensor score = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor weight = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  const RowView view = row_view(logits_shard);
  const DrawArguments arguments(seed, {temperature}, {}, {}, sizes.vocab);
  float* maximum_out = maximum.mutable_data_ptr<float>();
  float* sum_exp_out = sum_exp.mutable_data_ptr<float>();
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* score_out = score.mutable_data_ptr<float>();
  float* weight_out = weight.mutable_data_ptr<float>();

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t row) {
      return VisibleRow<T>{data + row * view.row_stride, sizes.vocab, sizes.local_suppress,
                           nullptr};
    };
    const auto temperature_of = [&](int64_t) { return temperature; };
    draw_rows<T>(view.rows, sizes.vocab, row_of, temperature_of,
                 [&](int64_t row, const RowDraw<T>& draw, DrawScratch* scratch) {
                   maximum_out[row] = draw.maximum;
                   if (!draw.defined()) {  // NaN, +inf or only -inf: the maximum tells which
                     const bool empty = draw.maximum == -std::numeric_limits<float>::infinity();
                     sum_exp_out[row] = weight_out[row] =
                         empty ? 0.0f : std::numeric_limits<float>::quiet_NaN();
                     token_out[row] = vocab_start + draw.first_maximum();
                     score_out[row] = draw.maximum;
                     return;
                   }
                   const Drawn drawn =
                       draw.draw(arguments.key(row), Cut{}, vocab_start, scratch->scores.data());
                   sum_exp_out[row] = static_cast<float>(draw.total);
                   token_out[row] = vocab_start + drawn.token;
                   score_out[row] = drawn.score;
                   weight_out[row] = static_cast<float>(draw.weight(drawn.logit));
                 });
  });
  return {maximum, sum_exp, token, score, weight};
}

std::tuple<Tensor, Tensor> sample_merge(Tensor maximum, Tensor sum_exp, Tensor token, Tensor score,
                                        Tensor weight, double temperature) {
  const auto sizes = check_sample_merge(maximum, sum_exp, token, score, weight, temperature);
  const Sizes out_sizes(maximum.sizes().begin() + 1, maximum.sizes().end());
  Tensor sampled = empty_like_device(maximum, out_sizes, ScalarType::Long);
  Tensor probability = empty_like_device(maximum, out_sizes, ScalarType::Float);
  const Tensor maximum_c = as_contiguous(maximum);
  const Tensor sum_exp_c = as_contiguous(sum_exp);
  const Tensor token_c = as_contiguous(token);
  const Tensor score_c = as_contiguous(score);
  const Tensor weight_c = as_contiguous(weight);
  const float* scores = score_c.const_data_ptr<float>();
  const float* weights = weight_c.const_data_ptr<float>();
  int64_t* sampled_out = sampled.mutable_data_ptr<int64_t>();
  float* probability_out = probability.mutable_data_ptr<float>();
  const ShardRows shards{sizes.shards,
                         sizes.rows,
                         maximum_c.const_data_ptr<float>(),
                         sum_exp_c.const_data_ptr<float>(),
                         token_c.const_data_ptr<int64_t>(),
                         temperature};
  for_each_merged_row(shards, [&](int64_t row) {
    const int64_t best = shards.winner(scores, row);
    const float maximum = shards.maxima[shards.winner(shards.maxima, row)];
    const double mass = weights[best] * shards.factor(best, maximum);
    sampled_out[row] = shards.tokens[best];
    probability_out[row] = is_finite(maximum)
                               ? static_cast<float>(mass / shards.total(row, maximum))
                               : std::numeric_limits<float>::quiet_NaN();
  });
  return {sampled, probability};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&dmax::cpu::sample_tokens));
  m.impl("sample_partial", TORCH_BOX(&dmax::cpu::sample_partial));
  m.impl("sample_merge", TORCH_BOX(&dmax::cpu::sample_merge));
}
