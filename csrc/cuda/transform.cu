#include "cuda/transform.cuh"

#include "checks/transform.h"
#include "cuda/host.h"

namespace dmax::cuda {

void transform_logits_(Tensor logits, double softcap, OptionalTensor bias,
                       OptionalTensor output_counts, OptionalTensor prompt_tokens,
                       OptionalTensor penalties, double repetition_penalty, double presence_penalty,
                       double frequency_penalty) {
  constexpr const char* op = "transform_logits_";
  const TransformSizes sizes =
      check_transform_logits_(logits, softcap, bias, output_counts, prompt_tokens, penalties,
                              repetition_penalty, presence_penalty, frequency_penalty);
  const Call call(op, logits);
  const RowView view = mutable_row_view(op, "logits", logits);
  if (view.rows == 0) return;
  call.check_blocks(view.rows);

  TransformArgs args{};
  args.logits = view.tensor.mutable_data_ptr();
  args.row_stride = view.row_stride;
  args.rows = static_cast<unsigned>(view.rows);
  args.vocab = static_cast<int>(sizes.vocab);
  args.softcap = static_cast<float>(softcap);
  args.inverse_softcap = softcap > 0 ? static_cast<float>(1.0 / softcap) : 0.0f;
  args.penalties = {static_cast<float>(repetition_penalty), static_cast<float>(presence_penalty),
                    static_cast<float>(frequency_penalty)};
  args.shared = args.rows;
  std::vector<Tensor> copies;  // of operands that were not contiguous
  const auto operand = [&](const OptionalTensor& tensor, int64_t per, auto* shared) {
    if (!tensor) return;
    copies.push_back(as_contiguous(*tensor));
    using Data = decltype(shared->data);
    *shared = {static_cast<Data>(copies.back().const_data_ptr()), static_cast<unsigned>(per)};
    args.shared = std::min(args.shared, shared->per);
  };
  operand(bias, sizes.per_bias, &args.bias);
  operand(output_counts, sizes.per_counts, &args.counts);
  operand(prompt_tokens, sizes.per_prompt, &args.prompt);
  operand(penalties, sizes.per_penalties, &args.row_penalties);

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const LaunchShape shape = cut_transform<T>(&args, call.device.multiprocessors);
    call.check(launch(shape, call.stream, transform_logits_kernel<T>, args));
  });
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("transform_logits_", TORCH_BOX(&dmax::cuda::transform_logits_));
}
