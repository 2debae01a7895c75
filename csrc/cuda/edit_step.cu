#include "cuda/edit_step.cuh"

#include "checks/step.h"
#include "cuda/host.h"

namespace dmax::cuda {

void edit_step_(Tensor logits, Tensor editable, Tensor token, Tensor prediction, Tensor confidence,
                Tensor post_edit_steps, Tensor done, int64_t mask_token_id, double threshold,
                double edit_threshold, int64_t rule, int64_t tokens_per_step,
                int64_t max_post_edit_steps, double temperature, int64_t suppress_token,
                OptionalTensor thresholds, OptionalTensor allowed) {
  const auto sizes =
      check_edit_step_(logits, editable, token, prediction, confidence, post_edit_steps, done,
                       mask_token_id, threshold, edit_threshold, rule, tokens_per_step,
                       max_post_edit_steps, temperature, suppress_token, thresholds, allowed);
  const Call call("edit_step_", logits);
  const RowView view = row_view(logits);
  if (view.rows == 0) return;
  OptionalTensor taus;
  if (thresholds) taus = as_contiguous(*thresholds);
  const Mask mask(allowed, view.width);

  EditArgs args{};
  args.editable = editable.const_data_ptr<bool>();
  args.token = token.mutable_data_ptr<int64_t>();
  args.prediction = prediction.mutable_data_ptr<int64_t>();
  args.confidence = confidence.mutable_data_ptr<float>();
  args.post_edit_steps = post_edit_steps.mutable_data_ptr<int32_t>();
  args.done = done.mutable_data_ptr<bool>();
  args.thresholds = taus ? taus->const_data_ptr<float>() : nullptr;
  args.block = static_cast<int>(sizes.block);
  args.mask_token_id = mask_token_id;
  args.threshold = static_cast<float>(threshold);
  args.edit_threshold = static_cast<float>(edit_threshold);
  args.rule = static_cast<EditRule>(rule);
  args.tokens_per_step = static_cast<int>(std::min(tokens_per_step, sizes.block));
  args.max_post_edit_steps = static_cast<int>(max_post_edit_steps);

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowWork work{view.rows, sizes.vocab, kEditResident, sizes.batch};
    launch_rows<T, Top1Partial>(call, logits, work, [&](const RowLaunch& run) {
      args.row_counters = run.split.counters + run.row_counters;
      return with_mask(
          logits_view<T>(view, suppress_token, temperature), mask.input(),
          [&](const auto& of_rows) { return launch_edit_step(run, of_rows, args, call.stream); });
    });
  });
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("edit_step_", TORCH_BOX(&dmax::cuda::edit_step_));
}
