#include "cuda/spd_step.cuh"

#include "checks/step.h"
#include "cuda/host.h"

namespace dmax::cuda {

void spd_step_(Tensor logits, Tensor embedding, Tensor editable, Tensor masked, Tensor token,
               Tensor confidence, Tensor converged, Tensor step, Tensor inputs_embeds,
               int64_t mask_token_id, double tau_dec, double tau_acc, int64_t semantics,
               int64_t top_k, double temperature, int64_t suppress_token, OptionalTensor thresholds,
               OptionalTensor allowed) {
  const auto sizes =
      check_spd_step_(logits, embedding, editable, masked, token, confidence, converged, step,
                      inputs_embeds, mask_token_id, tau_dec, tau_acc, semantics, top_k, temperature,
                      suppress_token, thresholds, allowed);
  const Call call("spd_step_", logits);
  const RowView view = row_view(logits);
  if (view.rows == 0) return;
  const RowView table = row_view(embedding);
  OptionalTensor tau;
  if (thresholds) tau = as_contiguous(*thresholds);
  const Mask mask(allowed, view.width);

  SpdArgs args{};
  args.editable = editable.const_data_ptr<bool>();
  args.masked = masked.mutable_data_ptr<bool>();
  args.token = token.mutable_data_ptr<int64_t>();
  args.confidence = confidence.mutable_data_ptr<float>();
  args.converged = converged.mutable_data_ptr<bool>();
  args.step = step.mutable_data_ptr<int32_t>();
  args.inputs_embeds = inputs_embeds.mutable_data_ptr();
  args.thresholds = tau ? tau->const_data_ptr<float>() : nullptr;
  args.table = embedding_table(table, mask_token_id, inputs_embeds);
  args.block = static_cast<int>(sizes.block);
  args.top_k = static_cast<int>(top_k);
  args.tau_dec = static_cast<float>(tau_dec);
  args.tau_acc = static_cast<float>(tau_acc);
  args.semantics = static_cast<Semantics>(semantics);

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const RowWork work = spd_work(view.rows, sizes.vocab, sizes.batch, top_k, bool(mask));
    launch_rows<T, Top1Partial>(call, logits, work, [&](const RowLaunch& run) {
      const size_t predictions = view.rows * sizeof(Prediction);
      const size_t lists = top_k > 1 ? list_bytes(run, args.top_k) : 0;
      const size_t listed = top_k > 1 ? view.rows * top_k * sizeof(Listed) : 0;
      const Tensor scratch = call.scratch(logits, predictions + lists + listed);
      auto* memory = static_cast<char*>(scratch.mutable_data_ptr());
      // The predictions come first, since they alone need an alignment of 16 bytes
      args.predictions = reinterpret_cast<Prediction*>(memory);
      args.lists = reinterpret_cast<Rank*>(memory + predictions);
      args.listed = reinterpret_cast<Listed*>(memory + predictions + lists);
      args.row_counters = run.split.counters + run.row_counters;
      return with_mask(
          logits_view<T>(view, suppress_token, temperature), mask.input(),
          [&](const auto& of_rows) { return launch_spd_step(run, of_rows, args, call.stream); });
    });
  });
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) { m.impl("spd_step_", TORCH_BOX(&dmax::cuda::spd_step_)); }
