#include "cuda/promote.cuh"
#include "cuda/statistics.cuh"
#include "cuda/sample_merge.cuh"
#include "cuda/sample_partial.cuh"
#include "cuda/sample_tokens.cuh"
#include "cuda/top1_confidence.cuh"
#include "cuda/top1_merge.cuh"
#include "cuda/top1_partial.cuh"
#include "cuda/topk_confidence.cuh"
#include "simt/run_ops.h"

namespace dmax::cuda {

template <class T, class Finish>
Chosen run_top1_rows(const Gpu& gpu, const LogitsInput& in, const Finish& finish) {
  const RowLaunch launch = choose_top1_launch<T>(in.rows, in.vocab, device_of(gpu));
  Scratch scratch(launch.scratch_bytes);
  Counters counters(launch.counters);
  launch_top1_rows(view_of<T>(in), launch, row_split(launch, scratch.data(), counters.data()),
                   finish, Stream{});
  return chosen(launch);
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
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    const RowLaunch launch = choose_topk_launch<T>(in.rows, in.vocab, device_of(gpu));
    Scratch scratch(launch.scratch_bytes);
    Scratch lists(list_bytes(in.rows, launch, k));
    Counters counters(launch.counters);
    launch_topk_rows(view_of<T>(in), launch, row_split(launch, scratch.data(), counters.data()),
                     static_cast<Rank*>(lists.data()),
                     {pointer<int64_t>(tokens), pointer<float>(confidences), k}, Stream{});
    result = chosen(launch);
  });
  return result;
}

Chosen row_statistics(Gpu gpu, LogitsInput in, Address token, Address confidence, Address runner_up,
                      Address entropy, Address logsumexp) {
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    const RowLaunch launch = choose_row_statistics_launch<T>(in.rows, in.vocab, device_of(gpu));
    Scratch scratch(launch.scratch_bytes);
    Counters counters(launch.counters);
    const RowStatisticsOutput out{pointer<int64_t>(token),   pointer<float>(confidence),
                                  pointer<float>(runner_up), pointer<float>(entropy),
                                  pointer<float>(logsumexp), 1.0 / in.temperature};
    launch_row_statistics(view_of<T>(in), launch,
                          row_split(launch, scratch.data(), counters.data()), out, Stream{});
    result = chosen(launch);
  });
  return result;
}

template <class T, FirstId kFirst, class Finish>
Chosen run_sample_rows(const Gpu& gpu, const LogitsInput& in, const SampleKey& key,
                       const Finish& finish) {
  const RowLaunch launch = choose_sample_launch<T>(in.rows, in.vocab, device_of(gpu));
  Scratch scratch(launch.scratch_bytes);
  Counters counters(launch.counters);
  launch_sample_rows<T, kFirst>(view_of<T>(in), launch,
                                row_split(launch, scratch.data(), counters.data()), key, finish,
                                Stream{});
  return chosen(launch);
}

static SampleKey sample_key(const LogitsInput& in, Address seed, bool seed_per_row,
                            int64_t first_id) {
  return {pointer<const int64_t>(seed), seed_per_row, static_cast<float>(1.0 / in.temperature),
          static_cast<uint32_t>(first_id)};
}

Chosen sample_tokens(Gpu gpu, LogitsInput in, Address seed, bool seed_per_row, Address token,
                     Address probability) {
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    const SampleTokensFinish finish{pointer<int64_t>(token), pointer<float>(probability)};
    result = run_sample_rows<decltype(element), FirstId::kZero>(
        gpu, in, sample_key(in, seed, seed_per_row, 0), finish);
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
    result = vocab_start % 4 == 0 ? run_sample_rows<T, FirstId::kMultipleOf4>(gpu, in, key, finish)
                                  : run_sample_rows<T, FirstId::kAny>(gpu, in, key, finish);
  });
  return result;
}

static ShardRows shard_rows(Address maximum, Address sum_exp, Address token, int64_t shards,
                            int64_t rows, double temperature) {
  return {pointer<const float>(maximum),
          pointer<const float>(sum_exp),
          pointer<const int64_t>(token),
          shards,
          rows,
          softmax_scale(temperature)};
}

Chosen top1_merge(Address maximum, Address sum_exp, Address token, int64_t shards, int64_t rows,
                  double temperature, Address merged_token, Address confidence) {
  launch_top1_merge(shard_rows(maximum, sum_exp, token, shards, rows, temperature),
                    {pointer<int64_t>(merged_token), pointer<float>(confidence)}, Stream{});
  return {1, 1, choose_merge_launch(rows).blocks, kMergeThreads};
}

Chosen sample_merge(Address maximum, Address sum_exp, Address token, int64_t shards, int64_t rows,
                    double temperature, Address score, Address weight, Address sampled,
                    Address probability) {
  launch_sample_merge(shard_rows(maximum, sum_exp, token, shards, rows, temperature),
                      {pointer<const float>(score), pointer<const float>(weight),
                       pointer<int64_t>(sampled), pointer<float>(probability)},
                      Stream{});
  return {1, 1, choose_merge_launch(rows).blocks, kMergeThreads};
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
  launch_prefix_promote(args, Stream{});
  return {1, 1, choose_prefix_promote_launch(rows).blocks, kPromoteWarps * kWarpSize};
}

}  // namespace dmax::cuda
