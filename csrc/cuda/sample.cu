#include "cuda/sample_filtered.cuh"

#include "checks/rows.h"
#include "cuda/host.h"
#include "cuda/top1.cuh"

namespace dmax::cuda {

// `seeds` is contiguous
static SampleKey sample_key(const Tensor& seeds, double temperature, int64_t first_id) {
  return {seeds.const_data_ptr<int64_t>(), is_seed_per_row(seeds),
          static_cast<float>(1.0 / temperature), static_cast<uint32_t>(first_id)};
}

template <class T, class Finish>
static void sample_rows(const Call& call, const Tensor& logits, const LogitsView<T>& view,
                        int64_t rows, const SampleKey& key, const Finish& finish) {
  launch_rows<T, SamplePartial>(call, logits, sample_work(rows, view.vocab),
                                [&](const RowLaunch& run) {
                                  return launch_sample_rows(run, view, key, finish, call.stream);
                                });
}

template <class T>
static void launch_filtered(const Call& call, const Tensor& logits, const LogitsView<T>& view,
                            int64_t rows, const SampleKey& key, FilteredDraw draw,
                            const SampleResults& results) {
  RowLaunch run = choose_filtered_launch<T>({rows, view.vocab, kFilteredResident}, call.device);
  call.check_blocks(rows * run.split.splits);
  OptionalTensor tiles;
  if (run.partial_bytes > 0) {
    tiles = call.scratch(logits, run.partial_bytes);
    draw.tiles = static_cast<DrawTile*>(tiles->mutable_data_ptr());
  }
  if (run.row_counters > 0) run.split.counters = call.counters(run.row_counters);
  call.check(launch_sample_filtered(run, view, key, draw, results, call.stream));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens(
    Tensor logits, Tensor seed, double temperature, int64_t top_k, double top_p, double min_p,
    OptionalTensor row_options, int64_t suppress_token, OptionalTensor allowed) {
  check_sample_tokens(logits, seed, temperature, top_k, top_p, min_p, row_options, suppress_token,
                      allowed);
  const Call call("sample_tokens", logits);
  const Sizes out = leading_sizes(logits);
  Tensor token = empty_like_device(logits, out, ScalarType::Long);
  Tensor probability = empty_like_device(logits, out, ScalarType::Float);
  Tensor top1_probability = empty_like_device(logits, out, ScalarType::Float);
  Tensor relative_confidence = empty_like_device(logits, out, ScalarType::Float);
  const RowView rows = row_view(logits);
  if (rows.rows == 0) return {token, probability, top1_probability, relative_confidence};

  const DrawOptions options{temperature, static_cast<double>(top_k), top_p, min_p};
  const double safe_temperature = options.greedy() ? 1.0 : temperature;
  const Tensor seeds = as_contiguous(seed);
  const SampleKey key = sample_key(seeds, safe_temperature, 0);
  OptionalTensor packed_options, masks;
  FilteredDraw draw{options, nullptr, nullptr, 0, nullptr};
  if (row_options) {
    packed_options = as_contiguous(*row_options);
    draw.row_options = packed_options->const_data_ptr<float>();
  }
  if (allowed) {
    masks = as_contiguous(*allowed);
    draw.allowed = reinterpret_cast<const uint32_t*>(masks->const_data_ptr<int32_t>());
    const int64_t words = mask_words(rows.width);
    draw.allowed_stride = masks->numel() == words ? 0 : words;
  }
  const SampleResults results{
      token.mutable_data_ptr<int64_t>(), probability.mutable_data_ptr<float>(),
      top1_probability.mutable_data_ptr<float>(), relative_confidence.mutable_data_ptr<float>()};

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const LogitsView<T> view = logits_view<T>(rows, suppress_token, safe_temperature);
    if (needs_filtered_kernel(options, rows.width, row_options.has_value(), allowed.has_value())) {
      launch_filtered<T>(call, logits, view, rows.rows, key, draw, results);
    } else if (options.greedy()) {
      launch_rows<T, Top1Partial>(
          call, logits, top1_work(rows.rows, rows.width), [&](const RowLaunch& run) {
            return launch_top1_rows(run, view, GreedyFinish{results}, call.stream);
          });
    } else {
      sample_rows<T>(call, logits, view, rows.rows, key, SampleTokensFinish{results});
    }
  });
  return {token, probability, top1_probability, relative_confidence};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_partial(Tensor logits_shard, Tensor seed,
                                                                  int64_t vocab_start,
                                                                  double temperature,
                                                                  int64_t suppress_token) {
  const auto sizes =
      check_sample_partial(logits_shard, seed, vocab_start, temperature, suppress_token);
  const Call call("sample_partial", logits_shard);
  const Sizes out = leading_sizes(logits_shard);
  Tensor maximum = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor token = empty_like_device(logits_shard, out, ScalarType::Long);
  Tensor score = empty_like_device(logits_shard, out, ScalarType::Float);
  Tensor weight = empty_like_device(logits_shard, out, ScalarType::Float);
  const RowView rows = row_view(logits_shard);
  if (rows.rows == 0) return {maximum, sum_exp, token, score, weight};
  const Tensor seeds = as_contiguous(seed);
  const SampleKey key = sample_key(seeds, temperature, vocab_start);
  const SamplePartialFinish finish{
      maximum.mutable_data_ptr<float>(), sum_exp.mutable_data_ptr<float>(),
      token.mutable_data_ptr<int64_t>(), score.mutable_data_ptr<float>(),
      weight.mutable_data_ptr<float>(),  vocab_start};

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const LogitsView<T> view = logits_view<T>(rows, sizes.local_suppress, temperature);
    sample_rows<T>(call, logits_shard, view, rows.rows, key, finish);
  });
  return {maximum, sum_exp, token, score, weight};
}

std::tuple<Tensor, Tensor> sample_merge(Tensor maximum, Tensor sum_exp, Tensor token, Tensor score,
                                        Tensor weight, double temperature) {
  check_sample_merge(maximum, sum_exp, token, score, weight, temperature);
  return merge_shards("sample_merge", maximum, sum_exp, token, score, weight, temperature);
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("sample_tokens", TORCH_BOX(&dmax::cuda::sample_tokens));
  m.impl("sample_partial", TORCH_BOX(&dmax::cuda::sample_partial));
  m.impl("sample_merge", TORCH_BOX(&dmax::cuda::sample_merge));
}
