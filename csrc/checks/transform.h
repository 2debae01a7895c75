// The op that changes logits in place before a token is chosen from them.
#pragma once

#include "common/draw_options.h"
#include "common/memory_overlap.h"
#include "common/penalties.h"

namespace dmax {

// How many rows of logits share a row of each operand; 0 if it is absent
struct TransformSizes {
  int64_t vocab;
  int64_t per_bias = 0, per_counts = 0, per_prompt = 0, per_penalties = 0;
};

// An operand [..., width] is one for all rows of logits [..., V], one per block of positions (the
// leading sizes but the last) or one per row
inline int64_t rows_per_operand(const char* op, const char* name, const OptionalTensor& operand,
                                ScalarType dtype, int64_t width, const Tensor& logits) {
  if (!operand) return 0;
  check_dtype(op, name, *operand, dtype);
  check_same_device(op, name, *operand, "logits", logits);
  const Sizes rows = leading_sizes(logits);
  const int64_t last = operand->dim() - 1;
  if (last >= 0 && operand->size(last) == width && operand->numel() == width) {
    const int64_t all = logits.numel() / logits.size(logits.dim() - 1);
    return all > 0 ? all : 1;
  }
  Sizes need = rows;
  const bool per_block = !rows.empty() && last == static_cast<int64_t>(rows.size()) - 1;
  if (per_block) need.pop_back();
  need.push_back(width);
  check_shape(op, name, *operand, need, "one for all rows, one per block of rows or one per row");
  return per_block && rows.back() > 0 ? rows.back() : 1;
}

inline void check_penalties(const char* op, const Penalties& penalties,
                            const std::string& where = {}) {
  DMAX_CHECK(penalties.repetition > 0 && is_finite_number(penalties.repetition), op,
             ": repetition_penalty must be above 0 (1 for none), got ", penalties.repetition,
             where);
  for (const auto& [name, penalty] :
       {std::pair<const char*, float>{"presence_penalty", penalties.presence},
        {"frequency_penalty", penalties.frequency}}) {
    DMAX_CHECK(is_finite_number(penalty), op, ": ", name, " must be finite (0 for none), got ",
               penalty, where);
  }
}

// Read on the CPU alone, as row_options of a draw: on a GPU that would wait for the device
inline void check_row_penalties(const char* op, const Tensor& penalties) {
  if (penalties.is_cuda()) return;
  const Tensor values = as_contiguous(penalties);
  for (int64_t row = 0; row < values.numel() / 3; ++row) {
    const Penalties of_row = penalties_of(values.const_data_ptr<float>(), row);
    if (!of_row.valid()) check_penalties(op, of_row, " in row " + std::to_string(row));
  }
}

inline TransformSizes check_transform_logits_(const Tensor& logits, double softcap,
                                              const OptionalTensor& bias,
                                              const OptionalTensor& output_counts,
                                              const OptionalTensor& prompt_tokens,
                                              const OptionalTensor& penalties,
                                              double repetition_penalty, double presence_penalty,
                                              double frequency_penalty) {
  constexpr const char* op = "transform_logits_";
  TransformSizes sizes{check_logits(op, "logits", logits)};
  DMAX_CHECK(softcap == 0 || (softcap >= kLeastTemperature && softcap <= kMostTemperature), op,
             ": softcap must be 0 (none), or at least 1e-30 and at most 1e30, got ", softcap);
  const int64_t vocab = sizes.vocab;
  sizes.per_bias = rows_per_operand(op, "bias", bias, ScalarType::Float, vocab, logits);
  sizes.per_counts =
      rows_per_operand(op, "output_counts", output_counts, ScalarType::Int, vocab, logits);
  sizes.per_prompt = rows_per_operand(op, "prompt_tokens", prompt_tokens, ScalarType::Int,
                                      mask_words(vocab), logits);
  sizes.per_penalties = rows_per_operand(op, "penalties", penalties, ScalarType::Float, 3, logits);
  const Penalties numbers{static_cast<float>(repetition_penalty),
                          static_cast<float>(presence_penalty),
                          static_cast<float>(frequency_penalty)};
  check_penalties(op, numbers);
  const bool on_output = numbers.presence != 0 || numbers.frequency != 0;
  if (penalties) {
    DMAX_CHECK(numbers.repetition == 1 && !on_output, op,
               ": with penalties, repetition_penalty, presence_penalty and frequency_penalty must "
               "be left at their defaults, got ",
               numbers.repetition, ", ", numbers.presence, " and ", numbers.frequency);
    check_row_penalties(op, *penalties);
  }
  DMAX_CHECK(!on_output || output_counts, op,
             ": presence_penalty and frequency_penalty need output_counts, got none");
  DMAX_CHECK(!(penalties || numbers.repetition != 1) || output_counts || prompt_tokens, op,
             ": penalties need output_counts or prompt_tokens, got neither");
  mutable_row_view(op, "logits", logits);
  const auto given = [](const OptionalTensor& t) { return t ? &*t : nullptr; };
  check_no_overlap(op, {{"logits", &logits}},
                   {{"bias", given(bias)},
                    {"output_counts", given(output_counts)},
                    {"prompt_tokens", given(prompt_tokens)},
                    {"penalties", given(penalties)}});
  return sizes;
}

}  // namespace dmax
