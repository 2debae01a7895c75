#include "cuda/embedding_backward.cuh"

#include <array>

#include "checks/step.h"
#include "cuda/host.h"

namespace dmax::cuda {

namespace {

// token, confidence and masked made contiguous, and kept alive
struct MixTensors {
  Tensor token, confidence, masked;

  HybridArgs args(const EmbeddingTable& table, int64_t positions, int64_t k) const {
    return {table,
            token.const_data_ptr(),
            confidence.const_data_ptr<float>(),
            masked.const_data_ptr<bool>(),
            positions,
            static_cast<int>(k),
            token.scalar_type() == ScalarType::Long};
  }
};

MixTensors mix_tensors(const Tensor& token, const Tensor& confidence, const Tensor& masked) {
  return {as_contiguous(token), as_contiguous(confidence), as_contiguous(masked)};
}

// ATen's stable sort: (values, indices), with equal ids in their first order
std::pair<Tensor, Tensor> sort_stable(const Tensor& ids) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(ids), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

}  // namespace

Tensor hybrid_embedding(Tensor embedding, Tensor token, Tensor confidence, Tensor masked,
                        int64_t mask_token_id) {
  const auto sizes = check_hybrid_embedding(embedding, token, confidence, masked, mask_token_id);
  const Call call("hybrid_embedding", embedding);
  Sizes out_sizes = sizes_of(masked);
  out_sizes.push_back(sizes.dim);
  Tensor out = empty_like_device(embedding, out_sizes, embedding.scalar_type());
  if (sizes.positions == 0) return out;
  const RowView table = row_view(embedding);
  const MixTensors mix = mix_tensors(token, confidence, masked);
  const HybridArgs args =
      mix.args(embedding_table(table, mask_token_id, out), sizes.positions, sizes.k);
  dispatch_float(embedding.scalar_type(), [&](auto element) {
    call.check_blocks(sizes.positions);
    call.check(
        launch_hybrid_embedding<decltype(element)>(args, out.mutable_data_ptr(), call.stream));
  });
  return out;
}

std::tuple<Tensor, Tensor> hybrid_embedding_backward(Tensor grad_output, Tensor embedding,
                                                     Tensor token, Tensor confidence, Tensor masked,
                                                     int64_t mask_token_id) {
  const auto sizes = check_hybrid_embedding_backward(grad_output, embedding, token, confidence,
                                                     masked, mask_token_id);
  const Call call("hybrid_embedding_backward", embedding);
  Tensor grad_embedding = torch::stable::new_zeros(embedding, sizes_of(embedding));
  Tensor grad_confidence = empty_like_device(confidence, sizes_of(confidence), ScalarType::Float);
  if (sizes.positions == 0) return {grad_embedding, grad_confidence};

  const RowView table = row_view(embedding);
  const MixTensors mix = mix_tensors(token, confidence, masked);
  const Tensor grad = as_contiguous(grad_output);
  const int64_t entries = sizes.positions * sizes.k;
  const Tensor ids = empty_like_device(embedding, {entries}, ScalarType::Long);
  const Tensor positions = call.scratch(embedding, sizes.positions * sizeof(PositionGrad));
  const Tensor of_token = empty_like_device(embedding, {entries}, ScalarType::Float);
  const Tensor mask_sums =
      empty_like_device(embedding, {mask_slices(sizes.positions), sizes.dim}, ScalarType::Float);
  HybridBackwardArgs args{};
  args.forward = mix.args(embedding_table(table, mask_token_id, grad), sizes.positions, sizes.k);
  args.grad_output = grad.const_data_ptr();
  args.grad_confidence = grad_confidence.mutable_data_ptr<float>();
  args.grad_embedding = grad_embedding.mutable_data_ptr();
  args.positions = static_cast<PositionGrad*>(positions.mutable_data_ptr());
  args.of_token = of_token.mutable_data_ptr<float>();
  args.ids = ids.mutable_data_ptr<int64_t>();
  args.mask_sums = mask_sums.mutable_data_ptr<float>();

  dispatch_float(embedding.scalar_type(), [&](auto element) {
    using E = decltype(element);
    call.check(launch_hybrid_backward_positions<E>(args, call.stream));
    const auto [sorted_ids, sorted_order] = sort_stable(ids);
    args.sorted_ids = sorted_ids.template const_data_ptr<int64_t>();
    args.sorted_order = sorted_order.template const_data_ptr<int64_t>();
    call.check(launch_hybrid_backward_tokens<E>(args, call.stream));
    call.check(launch_hybrid_backward_mask_slices<E>(args, call.stream));
    call.check(launch_hybrid_backward_mask_row<E>(args, call.stream));
  });
  return {grad_embedding, grad_confidence};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("hybrid_embedding", TORCH_BOX(&dmax::cuda::hybrid_embedding));
  m.impl("hybrid_embedding_backward", TORCH_BOX(&dmax::cuda::hybrid_embedding_backward));
}
