#include "cuda/spd_step.cuh"

#include "checks/step.h"
#include "cuda/embedding_host.h"

namespace dmax::cuda {

void spd_step_(Tensor logits, Tensor embedding, Tensor editable, Tensor masked, Tensor token,
               Tensor confidence, Tensor converged, Tensor step, Tensor inputs_embeds,
               int64_t mask_token_id, double tau_dec, double tau_acc, int64_t semantics,
               int64_t top_k, double temperature, int64_t suppress_token,
               OptionalTensor thresholds) {
  const auto sizes = check_spd_step_(
      logits, embedding, editable, masked, token, confidence, converged, step, inputs_embeds,
      mask_token_id, tau_dec, tau_acc, semantics, top_k, temperature, suppress_token, thresholds);
  const Call call("spd_step_", logits);
  const RowView view = row_view(logits);
  if (view.rows == 0) return;
  const RowView table = row_view(embedding);
  OptionalTensor tau;
  if (thresholds) tau = torch::stable::contiguous(*thresholds);

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
    const RowLaunch chosen =
        choose_spd_launch<T>(sizes.batch, sizes.block, sizes.vocab, call.device);
    call.check_blocks(view.rows * chosen.splits);

    // One allocation: partial results, lists, listed, predictions; each a multiple of 16 bytes
    const SpdScratch bytes = spd_scratch(chosen, sizes.batch, sizes.block, args.top_k);
    const auto padded = [](size_t size) { return (size + 15) / 16 * 16; };
    const Tensor scratch = call.scratch(logits, padded(chosen.scratch_bytes) + padded(bytes.lists) +
                                                    padded(bytes.listed) + bytes.predictions);
    char* next = static_cast<char*>(scratch.mutable_data_ptr());
    const auto take = [&](size_t size) {
      char* taken = next;
      next += padded(size);
      return static_cast<void*>(taken);
    };
    void* partials = take(chosen.scratch_bytes);
    args.lists = static_cast<Rank*>(take(bytes.lists));
    args.listed = static_cast<Listed*>(take(bytes.listed));
    args.predictions = static_cast<Prediction*>(take(bytes.predictions));
    unsigned* counters = call.counters(chosen.counters + sizes.batch);
    args.row_counters = counters + chosen.counters;
    call.check(launch_spd_step(logits_view<T>(view, suppress_token, temperature), chosen,
                               row_split(chosen, partials, counters), args, call.stream));
  });
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) { m.impl("spd_step_", TORCH_BOX(&dmax::cuda::spd_step_)); }
