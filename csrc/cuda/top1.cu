#include "cuda/top1.cuh"

#include "checks/rows.h"
#include "cuda/host.h"
#include "cuda/shard_merge.cuh"

namespace dmax::cuda {

std::tuple<Tensor, Tensor> top1_confidence(Tensor logits, double temperature,
                                           int64_t suppress_token, OptionalTensor allowed) {
  check_top1_confidence(logits, temperature, suppress_token, allowed);
  const Call call("top1_confidence", logits);
  Tensor token = empty_like_device(logits, leading_sizes(logits), ScalarType::Long);
  Tensor confidence = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  const RowView rows = row_view(logits);
  if (rows.rows == 0) return {token, confidence};
  const Top1ConfidenceFinish finish{token.mutable_data_ptr<int64_t>(),
                                    confidence.mutable_data_ptr<float>()};
  const Mask mask(allowed, rows.width);

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowWork work = top1_work(rows.rows, rows.width, bool(mask));
    launch_rows<T, Top1Partial>(call, logits, work, [&](const RowLaunch& run) {
      return with_mask(
          logits_view<T>(rows, suppress_token, temperature), mask.input(),
          [&](const auto& view) { return launch_top1_rows(run, view, finish, call.stream); });
    });
  });
  return {token, confidence};
}

std::tuple<Tensor, Tensor, Tensor> top1_partial(Tensor logits_shard, int64_t vocab_start,
                                                double temperature, int64_t suppress_token,
                                                OptionalTensor allowed) {
  const auto sizes =
      check_top1_partial(logits_shard, vocab_start, temperature, suppress_token, allowed);
  const Call call("top1_partial", logits_shard);
  const Sizes out = leading_sizes(logits_shard);
  Tensor maximum = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor token = empty_like_device(logits_shard, out, ScalarType::Long);
  const RowView rows = row_view(logits_shard);
  if (rows.rows == 0) return {maximum, sum_exp, token};
  const Top1PartialFinish finish{maximum.mutable_data_ptr<float>(),
                                 sum_exp.mutable_data_ptr<float>(),
                                 token.mutable_data_ptr<int64_t>(), vocab_start};
  const Mask mask(allowed, rows.width);

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowWork work = top1_work(rows.rows, rows.width, bool(mask));
    launch_rows<T, Top1Partial>(call, logits_shard, work, [&](const RowLaunch& run) {
      return with_mask(
          logits_view<T>(rows, sizes.local_suppress, temperature), mask.input(),
          [&](const auto& view) { return launch_top1_rows(run, view, finish, call.stream); });
    });
  });
  return {maximum, sum_exp, token};
}

std::tuple<Tensor, Tensor> topk_confidence(Tensor logits, int64_t k, double temperature,
                                           int64_t suppress_token, OptionalTensor allowed) {
  check_topk_confidence(logits, k, temperature, suppress_token, allowed);
  const Call call("topk_confidence", logits);
  Sizes out_sizes = leading_sizes(logits);
  out_sizes.push_back(k);
  Tensor tokens = empty_like_device(logits, out_sizes, ScalarType::Long);
  Tensor confidences = empty_like_device(logits, out_sizes, ScalarType::Float);
  const RowView rows = row_view(logits);
  if (rows.rows == 0) return {tokens, confidences};
  const TopkOutput out{tokens.mutable_data_ptr<int64_t>(), confidences.mutable_data_ptr<float>(),
                       static_cast<int>(k)};
  const Mask mask(allowed, rows.width);

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_rows<T, Top1Partial>(
        call, logits, {rows.rows, rows.width, kTopkResident}, [&](const RowLaunch& run) {
          const Tensor lists = call.scratch(logits, list_bytes(run, out.k));
          return with_mask(logits_view<T>(rows, suppress_token, temperature), mask.input(),
                           [&](const auto& view) {
                             return launch_topk_rows(run, view,
                                                     static_cast<Rank*>(lists.mutable_data_ptr()),
                                                     out, call.stream);
                           });
        });
  });
  return {tokens, confidences};
}

std::tuple<Tensor, Tensor> merge_shards(const char* op, const Tensor& maximum,
                                        const Tensor& sum_exp, const Tensor& token,
                                        const OptionalTensor& score, const OptionalTensor& weight,
                                        double temperature) {
  const Call call(op, maximum);
  const Sizes out(maximum.sizes().begin() + 1, maximum.sizes().end());
  Tensor merged = empty_like_device(maximum, out, ScalarType::Long);
  Tensor probability = empty_like_device(maximum, out, ScalarType::Float);
  if (maximum.numel() == 0) return {merged, probability};
  const Tensor maxima = as_contiguous(maximum);
  const Tensor sums = as_contiguous(sum_exp);
  const Tensor tokens = as_contiguous(token);
  OptionalTensor scores, weights;
  ShardRows shards{maxima.const_data_ptr<float>(),
                   sums.const_data_ptr<float>(),
                   tokens.const_data_ptr<int64_t>(),
                   nullptr,
                   nullptr,
                   maximum.size(0),
                   maximum.numel() / maximum.size(0),
                   softmax_scale(temperature)};
  if (score) {
    scores = as_contiguous(*score);
    weights = as_contiguous(*weight);
    shards.score = scores->const_data_ptr<float>();
    shards.weight = weights->const_data_ptr<float>();
  }
  call.check(launch(merge_shape(shards.rows), call.stream, merge_shards_kernel, shards,
                    merged.mutable_data_ptr<int64_t>(), probability.mutable_data_ptr<float>()));
  return {merged, probability};
}

std::tuple<Tensor, Tensor> top1_merge(Tensor maximum, Tensor sum_exp, Tensor token,
                                      double temperature) {
  check_top1_merge(maximum, sum_exp, token, temperature);
  return merge_shards("top1_merge", maximum, sum_exp, token, {}, {}, temperature);
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("top1_confidence", TORCH_BOX(&dmax::cuda::top1_confidence));
  m.impl("top1_partial", TORCH_BOX(&dmax::cuda::top1_partial));
  m.impl("topk_confidence", TORCH_BOX(&dmax::cuda::topk_confidence));
  m.impl("top1_merge", TORCH_BOX(&dmax::cuda::top1_merge));
}
