// Ops on rows of logits, and on the partial results of vocabulary shards.
//
// In every header of this folder, check_<op> takes the arguments of <op> in the same order and
// returns the sizes that the C++ kernels use.
#pragma once

#include "checks/draw.h"

namespace dmax {

inline void check_top_k(const char* op, const char* name, int64_t k, int64_t vocab) {
  DMAX_CHECK(k >= 1 && k <= kMaxTopK && k <= vocab, op, ": ", name, " must be in 1..",
             vocab < kMaxTopK ? vocab : kMaxTopK, " (at most ", kMaxTopK, " and at most V), got ",
             k);
}

// One temperature, or float32 temperatures [...]. Their values are read on the CPU alone, by
// temperatures_of (cpu/vocab_scan.h): on a GPU that would wait for the device, and the kernels give
// NaN for a row whose temperature is out of range.
inline void check_temperatures(const char* op, const char* logits_name, const Tensor& logits,
                               double temperature, const OptionalTensor& temperatures) {
  check_temperature(op, temperature);
  if (!temperatures) return;
  DMAX_CHECK(temperature == 1, op,
             ": temperature must be left at 1 where temperatures are given, got ", temperature);
  check_dtype(op, "temperatures", *temperatures, ScalarType::Float);
  check_shape(op, "temperatures", *temperatures, leading_sizes(logits), "one per row of logits");
  check_same_device(op, "temperatures", *temperatures, logits_name, logits);
}

// ---- Whole rows: logits [..., V]; each check returns V ----

inline int64_t check_rows(const char* op, const Tensor& logits, double temperature,
                          int64_t suppress_token, const OptionalTensor& allowed) {
  const int64_t vocab = check_logits(op, "logits", logits);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, vocab);
  if (allowed) check_allowed(op, *allowed, vocab, "logits", logits);
  return vocab;
}

inline int64_t check_top1_confidence(const Tensor& logits, double temperature,
                                     int64_t suppress_token, const OptionalTensor& allowed) {
  return check_rows("top1_confidence", logits, temperature, suppress_token, allowed);
}

inline int64_t check_topk_confidence(const Tensor& logits, int64_t k, double temperature,
                                     int64_t suppress_token, const OptionalTensor& allowed) {
  constexpr const char* op = "topk_confidence";
  check_top_k(op, "k", k, check_logits(op, "logits", logits));
  return check_rows(op, logits, temperature, suppress_token, allowed);
}

inline int64_t check_row_statistics(const Tensor& logits, double temperature,
                                    const OptionalTensor& temperatures, int64_t suppress_token,
                                    const OptionalTensor& allowed) {
  constexpr const char* op = "row_statistics";
  const int64_t vocab = check_rows(op, logits, temperature, suppress_token, allowed);
  check_temperatures(op, "logits", logits, temperature, temperatures);
  return vocab;
}

struct LogprobSizes {
  int64_t vocab;
  int64_t ids_per_row;
};

// `rows` is [..., V] or, from hidden states, [..., D]
inline LogprobSizes check_logprob_ids(const char* op, const Tensor& ids, const char* rows_name,
                                      const Tensor& rows, int64_t vocab, int64_t top_n) {
  check_integer(op, "ids", ids);
  check_same_device(op, "ids", ids, rows_name, rows);
  const bool one_per_row = ids.dim() == rows.dim() - 1;
  const int64_t per_row = one_per_row || ids.dim() == 0 ? 1 : ids.size(ids.dim() - 1);
  Sizes need = leading_sizes(rows);
  if (!one_per_row) need.push_back(per_row);
  const std::string meaning = std::string("one token per row of ") + rows_name + ", or n of them";
  check_shape(op, "ids", ids, need, meaning.c_str());
  DMAX_CHECK(per_row >= 1, op, ": ids must hold at least one token per row, got ",
             shape_text(ids.sizes()));
  const int64_t most = vocab < kMaxTopLogprobs ? vocab : kMaxTopLogprobs;
  DMAX_CHECK(top_n >= 0 && top_n <= most, op, ": top_n must be in 0..", most, " (at most ",
             kMaxTopLogprobs, " and at most V), got ", top_n);
  return {vocab, per_row};
}

inline LogprobSizes check_token_logprobs(const Tensor& logits, const Tensor& ids,
                                         double temperature, int64_t top_n,
                                         int64_t /*ignore_index*/, const OptionalTensor& allowed) {
  constexpr const char* op = "token_logprobs";
  const int64_t vocab = check_rows(op, logits, temperature, -1, allowed);
  return check_logprob_ids(op, ids, "logits", logits, vocab, top_n);
}

inline int64_t check_sample_tokens(const Tensor& logits, const Tensor& seed, double temperature,
                                   int64_t top_k, double top_p, double min_p,
                                   const OptionalTensor& row_options, int64_t suppress_token,
                                   const OptionalTensor& allowed) {
  constexpr const char* op = "sample_tokens";
  const int64_t vocab = check_logits(op, "logits", logits);
  check_draw(op, "logits", logits, vocab, seed,
             {temperature, static_cast<double>(top_k), top_p, min_p}, row_options, suppress_token,
             allowed);
  return vocab;
}

// ---- One vocabulary shard: logits [..., V / S] of the ids from vocab_start on ----

struct ShardSizes {
  int64_t vocab;           // size of this shard
  int64_t local_suppress;  // suppress_token's place on this shard, -1 if it is not here
};

inline ShardSizes check_shard(const char* op, const Tensor& logits_shard, int64_t vocab_start,
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

inline ShardSizes check_top1_partial(const Tensor& logits_shard, int64_t vocab_start,
                                     double temperature, int64_t suppress_token,
                                     const OptionalTensor& allowed) {
  constexpr const char* op = "top1_partial";
  const ShardSizes sizes = check_shard(op, logits_shard, vocab_start, temperature, suppress_token);
  if (allowed) check_allowed(op, *allowed, sizes.vocab, "logits_shard", logits_shard);
  return sizes;
}

inline ShardSizes check_sample_partial(const Tensor& logits_shard, const Tensor& seed,
                                       int64_t vocab_start, double temperature,
                                       int64_t suppress_token) {
  constexpr const char* op = "sample_partial";
  const ShardSizes sizes = check_shard(op, logits_shard, vocab_start, temperature, suppress_token);
  DMAX_CHECK(vocab_start % kDrawTile == 0, op, ": vocab_start must be a multiple of ", kDrawTile,
             ", the ids that a draw takes together, got ", vocab_start);
  constexpr int64_t kMost = int64_t{1} << 31;
  DMAX_CHECK(vocab_start <= kMost - sizes.vocab, op, ": token ids must be below ", kMost,
             ", got a shard of ", sizes.vocab, " from ", vocab_start);
  check_seed(op, seed, "logits_shard", logits_shard);
  return sizes;
}

// ---- The shards' partial results, [S, ...] each ----

struct MergeSizes {
  int64_t shards;
  int64_t rows;
};

inline MergeSizes check_merge(const char* op, const Tensor& maximum, const Tensor& sum_exp,
                              const Tensor& token, double temperature) {
  check_dtype(op, "maximum", maximum, ScalarType::Float);
  check_dtype(op, "sum_exp", sum_exp, ScalarType::Float);
  check_dtype(op, "token", token, ScalarType::Long);
  DMAX_CHECK(maximum.dim() >= 1 && maximum.size(0) >= 1, op,
             ": maximum must be [S, ...] with S >= 1 shards, got ", shape_text(maximum.sizes()));
  check_shape(op, "sum_exp", sum_exp, maximum.sizes(), "that of maximum");
  check_shape(op, "token", token, maximum.sizes(), "that of maximum");
  check_same_device(op, "sum_exp", sum_exp, "maximum", maximum);
  check_same_device(op, "token", token, "maximum", maximum);
  check_temperature(op, temperature);
  return {maximum.size(0), maximum.numel() / maximum.size(0)};
}

inline MergeSizes check_top1_merge(const Tensor& maximum, const Tensor& sum_exp,
                                   const Tensor& token, double temperature) {
  return check_merge("top1_merge", maximum, sum_exp, token, temperature);
}

inline MergeSizes check_sample_merge(const Tensor& maximum, const Tensor& sum_exp,
                                     const Tensor& token, const Tensor& score, const Tensor& weight,
                                     double temperature) {
  constexpr const char* op = "sample_merge";
  const MergeSizes sizes = check_merge(op, maximum, sum_exp, token, temperature);
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"score", score}, {"weight", weight}}) {
    check_dtype(op, name, t, ScalarType::Float);
    check_shape(op, name, t, maximum.sizes(), "that of maximum");
    check_same_device(op, name, t, "maximum", maximum);
  }
  return sizes;
}

}  // namespace dmax
