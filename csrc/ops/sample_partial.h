// sample_partial(logits_shard [..., V / S], seed, vocab_start) -> maximum f32, sum_exp f32, token
// i64, score f32, weight f32 [...]
#pragma once

#include "ops/sample_tokens.h"
#include "ops/top1_partial.h"

namespace dmax {

struct SamplePartialSizes {
  int64_t vocab;           // of this shard
  int64_t local_suppress;  // suppress_token's place on this shard, -1 where it lies elsewhere
  bool seed_per_row;       // then the row is not part of the counter
};

inline SamplePartialSizes check_sample_partial(const Tensor& logits_shard, const Tensor& seed,
                                               int64_t vocab_start, double temperature,
                                               int64_t suppress_token) {
  constexpr const char* op = "sample_partial";
  const Top1PartialSizes shard =
      check_shard(op, logits_shard, vocab_start, temperature, suppress_token);
  constexpr int64_t kMost = int64_t{1} << 31;
  DMAX_CHECK(vocab_start <= kMost - shard.vocab, op, ": token ids must be below ", kMost,
             ", got a shard of ", shard.vocab, " from ", vocab_start);
  return {shard.vocab, shard.local_suppress, check_seed(op, seed, "logits_shard", logits_shard)};
}

}  // namespace dmax
