// One step of threshold decoding with token editing on the CPU, row by row.
#include "checks/step.h"

#include <algorithm>
#include <functional>

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {

namespace {

struct EditOptions {
  EditRule rule;
  int64_t mask_token_id;
  int64_t tokens_per_step;
  int max_post_edit_steps;

  bool edits() const { return rule == EditRule::kJointThreshold; }
};

// The state of one row of the batch, K positions each
struct RowState {
  const bool* editable;
  int64_t* token;
  const int64_t* prediction;
  const float* confidence;
  int32_t* post_edit_steps;
  bool* done;
  int64_t block;

  bool masked(int64_t j, int64_t mask_token_id) const {
    return editable[j] && token[j] == mask_token_id;
  }
  bool any_masked(int64_t mask_token_id) const {
    for (int64_t j = 0; j < block; ++j)
      if (masked(j, mask_token_id)) return true;
    return false;
  }
};

// The least key that is filled for its rank: of the `count` best positions, NaN only if it is first
uint64_t least_key_by_rank(std::vector<uint64_t>* keys, int64_t count) {
  count = std::min<int64_t>(count, keys->size());
  std::partial_sort(keys->begin(), keys->begin() + count, keys->end(), std::greater<>());
  int64_t last = count - 1;
  while (last > 0 && (*keys)[last] < kLeastNumberKey) --last;
  return (*keys)[last];
}

void update_row(const RowState& row, float threshold, float edit_threshold,
                const EditOptions& options) {
  const bool any_masked = row.any_masked(options.mask_token_id);
  if (!any_masked) *row.post_edit_steps += 1;
  const bool spent = is_spent(any_masked, *row.post_edit_steps, options.max_post_edit_steps);

  std::vector<uint64_t> keys;  // of the positions that may be filled
  for (int64_t j = 0; j < row.block; ++j) {
    if (may_fill(options.rule, row.masked(j, options.mask_token_id), row.prediction[j],
                 options.mask_token_id))
      keys.push_back(order_key(row.confidence[j], static_cast<int>(j)));
  }
  const uint64_t least =
      keys.empty() ? 0 : least_key_by_rank(&keys, options.tokens_per_step);  // sorts the best first
  const float best = keys.empty() ? 0.0f : confidence_of_key(keys.front());

  bool edited = false;
  for (int64_t j = 0; j < row.block; ++j) {
    const float c = row.confidence[j];
    const int64_t y = row.prediction[j];
    if (!row.editable[j]) continue;
    if (row.token[j] == options.mask_token_id) {
      if (may_fill(options.rule, true, y, options.mask_token_id) &&
          (fills(options.rule, c, threshold, best) || order_key(c, static_cast<int>(j)) >= least))
        row.token[j] = y;
    } else if (options.edits() && !spent && passes(c, edit_threshold, false) && y != row.token[j]) {
      row.token[j] = y;
      edited = true;
    }
  }
  *row.done = !any_masked && !edited;
}

}  // namespace

void edit_step_(Tensor logits, Tensor editable, Tensor token, Tensor prediction, Tensor confidence,
                Tensor post_edit_steps, Tensor done, int64_t mask_token_id, double threshold,
                double edit_threshold, int64_t rule, int64_t tokens_per_step,
                int64_t max_post_edit_steps, double temperature, int64_t suppress_token,
                OptionalTensor thresholds, OptionalTensor allowed) {
  const auto [batch, block, vocab] =
      check_edit_step_(logits, editable, token, prediction, confidence, post_edit_steps, done,
                       mask_token_id, threshold, edit_threshold, rule, tokens_per_step,
                       max_post_edit_steps, temperature, suppress_token, thresholds, allowed);
  const EditOptions options{static_cast<EditRule>(rule), mask_token_id, tokens_per_step,
                            static_cast<int>(max_post_edit_steps)};
  const bool* editable_data = editable.const_data_ptr<bool>();
  int64_t* token_data = token.mutable_data_ptr<int64_t>();
  int64_t* prediction_data = prediction.mutable_data_ptr<int64_t>();
  float* confidence_data = confidence.mutable_data_ptr<float>();
  int32_t* steps_data = post_edit_steps.mutable_data_ptr<int32_t>();
  bool* done_data = done.mutable_data_ptr<bool>();
  OptionalTensor thresholds_c;
  if (thresholds) thresholds_c = as_contiguous(*thresholds);
  const float* taus = thresholds_c ? thresholds_c->const_data_ptr<float>() : nullptr;

  std::vector<RowState> rows;   // rows that are not done
  std::vector<int64_t> wanted;  // positions whose logits count
  for (int64_t b = 0; b < batch; ++b) {
    if (done_data[b]) continue;
    const int64_t at = b * block;
    const RowState row{editable_data + at,
                       token_data + at,
                       prediction_data + at,
                       confidence_data + at,
                       steps_data + b,
                       done_data + b,
                       block};
    rows.push_back(row);
    const bool spent = is_spent(row.any_masked(mask_token_id), *row.post_edit_steps + 1,
                                options.max_post_edit_steps);
    const bool may_edit = options.edits() && !spent;
    for (int64_t j = 0; j < block; ++j) {
      if (row.masked(j, mask_token_id) || (may_edit && row.editable[j])) wanted.push_back(at + j);
    }
  }

  const RowView view = row_view(logits);
  const AllowedMask mask(allowed, vocab);
  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const VocabScan scan{view.width, suppress_token, temperature};
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t i) {
      return ScannedRow<T>(data + wanted[i] * view.row_stride, mask.row(wanted[i]));
    };
    scan_rows<T>(wanted.size(), scan, row_of, [&](int64_t i, const RowStats& stats) {
      prediction_data[wanted[i]] = stats.token;
      confidence_data[wanted[i]] = stats.confidence();
    });
  });

  for (const RowState& row : rows) {
    const int64_t b = row.done - done_data;
    update_row(row, taus ? taus[2 * b] : static_cast<float>(threshold),
               taus ? taus[2 * b + 1] : static_cast<float>(edit_threshold), options);
  }
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) { m.impl("edit_step_", TORCH_BOX(&dmax::cpu::edit_step_)); }
