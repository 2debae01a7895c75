// What the ops that draw a token per row require beside the logits: seed, options and mask.
#pragma once

#include <string>

#include "common/constants.h"
#include "common/draw_options.h"
#include "common/tensor_checks.h"

namespace dmax {

// Whether the seed tensor holds one (seed, offset) per row; then the row is not part of the counter
inline bool is_seed_per_row(const Tensor& seed) { return seed.dim() != 1; }

inline void check_seed(const char* op, const Tensor& seed, const char* rows_name,
                       const Tensor& rows) {
  check_dtype(op, "seed", seed, ScalarType::Long);
  check_same_device(op, "seed", seed, rows_name, rows);
  Sizes need = is_seed_per_row(seed) ? leading_sizes(rows) : Sizes{};
  need.push_back(2);
  check_shape(op, "seed", seed, need, "one (seed, offset), or one per row");
}

// `where` ends each message: which row of row_options holds the value, nothing for the op's own
inline void check_draw_options(const char* op, const DrawOptions& options,
                               const std::string& where = {}) {
  DMAX_CHECK(is_draw_temperature(options.temperature), op,
             ": temperature must be 0 (greedy), or at least 1e-30 and at most 1e30, got ",
             options.temperature, where);
  DMAX_CHECK(is_draw_top_k(options.top_k), op,
             ": top_k must be 0 (off) or a whole number of tokens, got ", options.top_k, where);
  DMAX_CHECK(is_draw_top_p(options.top_p), op, ": top_p must be above 0 and at most 1 (off), got ",
             options.top_p, where);
  DMAX_CHECK(is_draw_min_p(options.min_p), op,
             ": min_p must be at least 0 (off) and at most 1, got ", options.min_p, where);
}

// float32 [..., 4]. The values are read on the CPU alone: on a GPU that would wait for the device,
// and the kernels give a row whose options are out of range token 0 and NaN instead.
inline void check_row_options(const char* op, const Tensor& row_options, const char* rows_name,
                              const Tensor& rows) {
  check_dtype(op, "row_options", row_options, ScalarType::Float);
  check_same_device(op, "row_options", row_options, rows_name, rows);
  Sizes need = leading_sizes(rows);
  need.push_back(4);
  check_shape(op, "row_options", row_options, need, "temperature, top_k, top_p and min_p per row");
  if (row_options.is_cuda()) return;
  const Tensor values = as_contiguous(row_options);
  const float* options = values.const_data_ptr<float>();
  for (int64_t row = 0; row < values.numel() / 4; ++row) {
    const DrawOptions of_row = draw_options_of(options, row);
    if (of_row.valid()) continue;
    check_draw_options(op, of_row, " in row " + std::to_string(row));
  }
}

// int32 [..., ceil(V / 32)], one row of bits per row or one for all
inline void check_allowed(const char* op, const Tensor& allowed, int64_t vocab,
                          const char* rows_name, const Tensor& rows) {
  check_dtype(op, "allowed", allowed, ScalarType::Int);
  check_same_device(op, "allowed", allowed, rows_name, rows);
  const int64_t words = mask_words(vocab);
  const int64_t last = allowed.dim() - 1;
  if (last >= 0 && allowed.size(last) == words && allowed.numel() == words) return;  // for all rows
  Sizes need = leading_sizes(rows);
  need.push_back(words);
  check_shape(op, "allowed", allowed, need, "a bit per token; or one row of them for all rows");
}

inline void check_draw(const char* op, const char* rows_name, const Tensor& rows, int64_t vocab,
                       const Tensor& seed, const DrawOptions& options,
                       const OptionalTensor& row_options, int64_t suppress_token,
                       const OptionalTensor& allowed) {
  DMAX_CHECK(vocab <= int64_t{kTileCounters}, op, ": V must be at most ", kTileCounters,
             ", where the tiles' random numbers begin, got ", vocab);
  check_draw_options(op, options);
  if (row_options) {
    const DrawOptions unset;
    DMAX_CHECK(options.temperature == unset.temperature && options.top_k == unset.top_k &&
                   options.top_p == unset.top_p && options.min_p == unset.min_p,
               op,
               ": with row_options, temperature, top_k, top_p and min_p must be left at their "
               "defaults, got ",
               options.temperature, ", ", options.top_k, ", ", options.top_p, " and ",
               options.min_p);
    check_row_options(op, *row_options, rows_name, rows);
  }
  check_suppress_token(op, suppress_token, vocab);
  if (allowed) check_allowed(op, *allowed, vocab, rows_name, rows);
  check_seed(op, seed, rows_name, rows);
}

}  // namespace dmax
