// top1_partial(logits_shard [..., V / S], vocab_start) -> maximum f32, sum_exp f32, token i64 [...]
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

struct Top1PartialSizes {
  int64_t vocab;           // of this shard
  int64_t local_suppress;  // suppress_token's place on this shard, -1 where it lies elsewhere
};

// What top1_partial and sample_partial share
inline Top1PartialSizes check_shard(const char* op, const Tensor& logits_shard, int64_t vocab_start,
                                    double temperature, int64_t suppress_token) {
  const int64_t vocab = check_logits(op, "logits_shard", logits_shard);
  DMAX_CHECK(vocab_start >= 0, op, ": vocab_start must be the id of the shard's first token, got ",
             vocab_start);
  check_temperature(op, temperature);
  DMAX_CHECK(suppress_token >= -1, op,
             ": suppress_token must be -1 (none) or a token id of the whole vocabulary, got ",
             suppress_token);
  const int64_t local = suppress_token - vocab_start;
  const bool on_shard = suppress_token >= 0 && local >= 0 && local < vocab;
  return {vocab, on_shard ? local : -1};
}

inline Top1PartialSizes check_top1_partial(const Tensor& logits_shard, int64_t vocab_start,
                                           double temperature, int64_t suppress_token) {
  return check_shard("top1_partial", logits_shard, vocab_start, temperature, suppress_token);
}

}  // namespace dmax
