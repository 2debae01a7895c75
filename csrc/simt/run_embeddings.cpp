// The embedding family, spd_step_ and edit_step_
#include <algorithm>
#include <numeric>

#include "cuda/edit_step.cuh"
#include "cuda/embedding_backward.cuh"
#include "cuda/spd_step.cuh"
#include "simt/run_ops.h"

namespace dmax::cuda {

static EmbeddingTable table_of(const EmbeddingInput& in, Address out) {
  const ElementType types[] = {ElementType::kFloat, ElementType::kBFloat16, ElementType::kFloat16};
  return make_table(pointer<const void>(in.data), in.stride, in.vocab, in.dim, in.mask_token_id,
                    types[in.dtype], pointer<const void>(out));
}

static HybridArgs hybrid_args(const EmbeddingInput& embedding, const MixInput& mix, Address out) {
  return {table_of(embedding, out),
          pointer<const void>(mix.token),
          pointer<const float>(mix.confidence),
          pointer<const bool>(mix.masked),
          mix.positions,
          mix.k,
          mix.wide_tokens};
}

Chosen hybrid_embedding(EmbeddingInput embedding, MixInput mix, Address out) {
  const HybridArgs args = hybrid_args(embedding, mix, out);
  dispatch(embedding.dtype, [&](auto element) {
    launch_hybrid_embedding<decltype(element)>(args, pointer<void>(out), Stream{});
  });
  const LaunchShape shape = hybrid_shape(mix.positions);
  return {1, 1, shape.blocks, shape.threads};
}

Chosen hybrid_embedding_backward(EmbeddingInput embedding, MixInput mix, Address grad_output,
                                 Address grad_embedding, Address grad_confidence) {
  const int64_t entries = mix.positions * mix.k;
  std::vector<PositionGrad> positions(mix.positions);
  std::vector<float> of_token(entries);
  std::vector<int64_t> ids(entries);
  std::vector<float> mask_sums(mask_slices(mix.positions) * embedding.dim);
  HybridBackwardArgs args{};
  args.forward = hybrid_args(embedding, mix, grad_output);
  args.grad_output = pointer<const void>(grad_output);
  args.grad_confidence = pointer<float>(grad_confidence);
  args.grad_embedding = pointer<void>(grad_embedding);
  args.positions = positions.data();
  args.of_token = of_token.data();
  args.ids = ids.data();
  args.mask_sums = mask_sums.data();
  dispatch(embedding.dtype, [&](auto element) {
    using E = decltype(element);
    launch_hybrid_backward_positions<E>(args, Stream{});
    std::vector<int64_t> order(entries);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    std::vector<int64_t> sorted(entries);
    for (int64_t i = 0; i < entries; ++i) sorted[i] = ids[order[i]];
    args.sorted_ids = sorted.data();
    args.sorted_order = order.data();
    launch_hybrid_backward_tokens<E>(args, Stream{});
    launch_hybrid_backward_mask_slices<E>(args, Stream{});
    launch_hybrid_backward_mask_row<E>(args, Stream{});
  });
  return {};
}

Chosen spd_step_(Gpu gpu, LogitsInput logits, EmbeddingInput embedding, StateInput state,
                 float tau_dec, float tau_acc, int semantics, int top_k) {
  const int64_t positions = state.batch * state.block;
  Scratch predictions(positions * sizeof(Prediction));
  Scratch listed(top_k > 1 ? positions * top_k * sizeof(Listed) : 0);
  SpdArgs args{};
  args.editable = pointer<const bool>(state.editable);
  args.masked = pointer<bool>(state.masked);
  args.token = pointer<int64_t>(state.token);
  args.confidence = pointer<float>(state.confidence);
  args.converged = pointer<bool>(state.converged);
  args.step = pointer<int32_t>(state.step);
  args.inputs_embeds = pointer<void>(state.inputs_embeds);
  args.thresholds = pointer<const float>(state.thresholds);
  args.table = table_of(embedding, state.inputs_embeds);
  args.block = static_cast<int>(state.block);
  args.top_k = top_k;
  args.tau_dec = tau_dec;
  args.tau_acc = tau_acc;
  args.semantics = static_cast<Semantics>(semantics);
  args.predictions = static_cast<Prediction*>(predictions.data());
  args.listed = static_cast<Listed*>(listed.data());
  const RowWork work = spd_work(positions, logits.vocab, state.batch, top_k, logits.allowed != 0);
  Chosen result;
  dispatch(logits.dtype, [&](auto element) {
    using T = decltype(element);
    result = launch_rows<T, Top1Partial>(gpu, work, [&](const RowLaunch& run) {
      Scratch lists(top_k > 1 ? list_bytes(run, top_k) : 0);
      args.lists = static_cast<Rank*>(lists.data());
      args.row_counters = run.split.counters + run.row_counters;
      with_mask(view_of<T>(logits), mask_of(logits),
                [&](const auto& view) { launch_spd_step(run, view, args, Stream{}); });
    });
  });
  return result;
}

Chosen edit_step_(Gpu gpu, LogitsInput logits, EditStateInput state, EditOptionsInput options) {
  EditArgs args{};
  args.editable = pointer<const bool>(state.editable);
  args.token = pointer<int64_t>(state.token);
  args.prediction = pointer<int64_t>(state.prediction);
  args.confidence = pointer<float>(state.confidence);
  args.post_edit_steps = pointer<int32_t>(state.post_edit_steps);
  args.done = pointer<bool>(state.done);
  args.thresholds = pointer<const float>(state.thresholds);
  args.block = static_cast<int>(state.block);
  args.mask_token_id = options.mask_token_id;
  args.threshold = options.threshold;
  args.edit_threshold = options.edit_threshold;
  args.rule = static_cast<EditRule>(options.rule);
  args.tokens_per_step = options.tokens_per_step;
  args.max_post_edit_steps = options.max_post_edit_steps;
  const RowWork work{state.batch * state.block, logits.vocab, kEditResident, state.batch};
  Chosen result;
  dispatch(logits.dtype, [&](auto element) {
    using T = decltype(element);
    result = launch_rows<T, Top1Partial>(gpu, work, [&](const RowLaunch& run) {
      args.row_counters = run.split.counters + run.row_counters;
      with_mask(view_of<T>(logits), mask_of(logits),
                [&](const auto& view) { launch_edit_step(run, view, args, Stream{}); });
    });
  });
  return result;
}

}  // namespace dmax::cuda
