// The families over rows of logits, and prefix_promote
#include "cuda/logprobs.cuh"
#include "cuda/promote.cuh"
#include "cuda/sample_filtered.cuh"
#include "cuda/shard_merge.cuh"
#include "cuda/statistics.cuh"
#include "cuda/top1.cuh"
#include "cuda/transform.cuh"
#include "simt/run_ops.h"

namespace dmax::cuda {

int64_t splits_of(int64_t rows, int64_t tiles, int64_t at_once) {
  return choose_splits(rows, tiles, at_once);
}

template <class T, class Finish>
Chosen run_top1_rows(const Gpu& gpu, const LogitsInput& in, const Finish& finish) {
  const RowWork work = top1_work(in.rows, in.vocab, in.allowed != 0);
  return launch_rows<T, Top1Partial>(gpu, work, [&](const RowLaunch& run) {
    with_mask(view_of<T>(in), mask_of(in),
              [&](const auto& view) { launch_top1_rows(run, view, finish, Stream{}); });
  });
}

Chosen top1_confidence(Gpu gpu, LogitsInput in, Address token, Address confidence) {
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    const Top1ConfidenceFinish finish{pointer<int64_t>(token), pointer<float>(confidence)};
    result = run_top1_rows<decltype(element)>(gpu, in, finish);
  });
  return result;
}

Chosen top1_partial(Gpu gpu, LogitsInput in, int64_t vocab_start, Address maximum, Address sum_exp,
                    Address token) {
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    const Top1PartialFinish finish{pointer<float>(maximum), pointer<float>(sum_exp),
                                   pointer<int64_t>(token), vocab_start};
    result = run_top1_rows<decltype(element)>(gpu, in, finish);
  });
  return result;
}

Chosen topk_confidence(Gpu gpu, LogitsInput in, int k, Address tokens, Address confidences) {
  const TopkOutput out{pointer<int64_t>(tokens), pointer<float>(confidences), k};
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    result = launch_rows<T, Top1Partial>(
        gpu, {in.rows, in.vocab, kTopkResident}, [&](const RowLaunch& run) {
          Scratch lists(list_bytes(run, k));
          with_mask(view_of<T>(in), mask_of(in), [&](const auto& view) {
            launch_topk_rows(run, view, static_cast<Rank*>(lists.data()), out, Stream{});
          });
        });
  });
  return result;
}

Chosen row_statistics(Gpu gpu, LogitsInput in, Address temperatures, Address token,
                      Address confidence, Address runner_up, Address entropy, Address logsumexp) {
  const RowStatisticsOutput out{pointer<int64_t>(token), pointer<float>(confidence),
                                pointer<float>(runner_up), pointer<float>(entropy),
                                pointer<float>(logsumexp)};
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    const RowWork work = statistics_work(in.rows, in.vocab, in.allowed != 0, temperatures != 0);
    result = launch_rows<T, StatisticsPartial>(gpu, work, [&](const RowLaunch& run) {
      with_mask(view_of<T>(in), mask_of(in), [&](const auto& view) {
        launch_row_statistics(run, view, in.temperature, pointer<const float>(temperatures), out,
                              Stream{});
      });
    });
  });
  return result;
}

Chosen token_logprobs(Gpu gpu, LogitsInput in, TokensInput tokens, int top_n, Address logprob,
                      Address rank, Address top_ids, Address top_logprobs, Address logsumexp) {
  const RowTokens row_tokens{
      {pointer<const void>(tokens.ids), tokens.wide}, tokens.per_row, tokens.ignore_index};
  const LogprobsOutput out{pointer<float>(logprob),
                           pointer<int64_t>(rank),
                           pointer<int64_t>(top_ids),
                           pointer<float>(top_logprobs),
                           pointer<float>(logsumexp),
                           top_n,
                           static_cast<float>(1.0 / in.temperature)};
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    result = launch_rows<T, Top1Partial>(
        gpu, {in.rows, in.vocab, logprobs_resident(top_n)}, [&](const RowLaunch& run) {
          Scratch counts(count_bytes(run, in.rows, tokens.per_row));
          Scratch lists(list_bytes(run, top_n));
          with_mask(view_of<T>(in), mask_of(in), [&](const auto& view) {
            launch_token_logprobs(run, view, row_tokens, static_cast<float*>(counts.data()),
                                  static_cast<Rank*>(lists.data()), out, Stream{});
          });
        });
  });
  return result;
}

template <class T, class Finish>
Chosen run_sample_rows(const Gpu& gpu, const LogitsInput& in, const SampleKey& key,
                       const Finish& finish) {
  return launch_rows<T, SamplePartial>(
      gpu, sample_work(in.rows, in.vocab), [&](const RowLaunch& run) {
        launch_sample_rows(run, view_of<T>(in), key, finish, Stream{});
      });
}

static SampleKey sample_key(const LogitsInput& in, Address seed, bool seed_per_row,
                            int64_t first_id) {
  return {pointer<const int64_t>(seed), seed_per_row, static_cast<float>(1.0 / in.temperature),
          static_cast<uint32_t>(first_id)};
}

template <class T>
Chosen run_sample_filtered(const Gpu& gpu, const LogitsInput& in, const SampleKey& key,
                           const DrawInput& draw, const SampleResults& results) {
  RowLaunch run = choose_filtered_launch<T>({in.rows, in.vocab, kFilteredResident}, device_of(gpu));
  Scratch tiles(run.partial_bytes);
  Counters counters(run.row_counters);
  run.split.counters = counters.data();
  const FilteredDraw filtered{{draw.temperature, draw.top_k, draw.top_p, draw.min_p},
                              pointer<const float>(draw.row_options),
                              pointer<const uint32_t>(draw.allowed),
                              draw.allowed_stride,
                              static_cast<DrawTile*>(tiles.data())};
  launch_sample_filtered(run, view_of<T>(in), key, filtered, results, Stream{});
  return {run.split.splits, static_cast<int>(run.shape.cluster), run.shape.blocks,
          run.shape.threads};
}

Chosen sample_tokens(Gpu gpu, LogitsInput in, Address seed, bool seed_per_row, DrawInput draw,
                     Address token, Address probability, Address top1_probability,
                     Address relative_confidence) {
  const SampleResults results{pointer<int64_t>(token), pointer<float>(probability),
                              pointer<float>(top1_probability),
                              pointer<float>(relative_confidence)};
  const DrawOptions options{draw.temperature, draw.top_k, draw.top_p, draw.min_p};
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    const SampleKey key = sample_key(in, seed, seed_per_row, 0);
    if (needs_filtered_kernel(options, in.vocab, draw.row_options != 0, draw.allowed != 0)) {
      result = run_sample_filtered<T>(gpu, in, key, draw, results);
    } else if (options.greedy()) {
      result = run_top1_rows<T>(gpu, in, GreedyFinish{results});
    } else {
      result = run_sample_rows<T>(gpu, in, key, SampleTokensFinish{results});
    }
  });
  return result;
}

Chosen sample_partial(Gpu gpu, LogitsInput in, Address seed, bool seed_per_row, int64_t vocab_start,
                      Address maximum, Address sum_exp, Address token, Address score,
                      Address weight) {
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    const SampleKey key = sample_key(in, seed, seed_per_row, vocab_start);
    const SamplePartialFinish finish{pointer<float>(maximum), pointer<float>(sum_exp),
                                     pointer<int64_t>(token), pointer<float>(score),
                                     pointer<float>(weight),  vocab_start};
    result = run_sample_rows<T>(gpu, in, key, finish);
  });
  return result;
}

Chosen transform_logits_(Gpu gpu, LogitsInput in, TransformInput input) {
  TransformArgs args{};
  args.logits = pointer<void>(in.data);
  args.row_stride = in.stride;
  args.rows = static_cast<unsigned>(in.rows);
  args.vocab = static_cast<int>(in.vocab);
  args.softcap = input.softcap;
  args.inverse_softcap = input.softcap > 0 ? 1.0f / input.softcap : 0.0f;
  args.bias = {pointer<const float>(input.bias), input.per_bias};
  args.counts = {pointer<const int32_t>(input.output_counts), input.per_counts};
  args.prompt = {pointer<const uint32_t>(input.prompt_tokens), input.per_prompt};
  args.row_penalties = {pointer<const float>(input.penalties), input.per_penalties};
  args.penalties = {input.repetition, input.presence, input.frequency};
  args.shared = std::min(std::min(input.per_bias, input.per_counts),
                         std::min(input.per_prompt, input.per_penalties));
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    const LaunchShape shape = cut_transform<T>(&args, gpu.multiprocessors);
    launch(shape, Stream{}, transform_logits_kernel<T>, args);
    result = {1, 1, shape.blocks, shape.threads};
  });
  return result;
}

static Chosen merge_shards(const ShardRows& shards, Address token, Address probability) {
  const LaunchShape shape = merge_shape(shards.rows);
  launch(shape, Stream{}, merge_shards_kernel, shards, pointer<int64_t>(token),
         pointer<float>(probability));
  return {1, 1, shape.blocks, shape.threads};
}

Chosen top1_merge(Address maximum, Address sum_exp, Address token, int64_t shards, int64_t rows,
                  double temperature, Address merged_token, Address confidence) {
  return merge_shards(
      {pointer<const float>(maximum), pointer<const float>(sum_exp), pointer<const int64_t>(token),
       nullptr, nullptr, shards, rows, softmax_scale(temperature)},
      merged_token, confidence);
}

Chosen sample_merge(Address maximum, Address sum_exp, Address token, int64_t shards, int64_t rows,
                    double temperature, Address score, Address weight, Address sampled,
                    Address probability) {
  return merge_shards({pointer<const float>(maximum), pointer<const float>(sum_exp),
                       pointer<const int64_t>(token), pointer<const float>(score),
                       pointer<const float>(weight), shards, rows, softmax_scale(temperature)},
                      sampled, probability);
}

Chosen prefix_promote(Address confidence, Address masked, int64_t rows, int block, float threshold,
                      bool inclusive, Address promoted) {
  const PrefixPromoteArgs args{pointer<const float>(confidence),
                               pointer<const bool>(masked),
                               pointer<bool>(promoted),
                               rows,
                               block,
                               block,
                               block,
                               threshold,
                               inclusive};
  const LaunchShape shape = warps_shape(rows, kPromoteWarps);
  launch(shape, Stream{}, prefix_promote_kernel, args);
  return {1, 1, shape.blocks, shape.threads};
}

}  // namespace dmax::cuda
