// The loss family
#include "cuda/loss_and_grad.cuh"
#include "simt/run_ops.h"

namespace dmax::cuda {

static Targets targets_of(const LossInput& in) {
  return {pointer<const void>(in.target), in.wide_target};
}

static LossOptions options_of(const LossInput& in) {
  return make_loss_options(in.ignore_index, in.label_smoothing, in.z_loss, in.temperature);
}

// The passes that are present
template <class T>
struct Passes {
  LossRows<T> rows{};
  int count = 0;
};

template <class T>
static Passes<T> passes_of(const LossInput& in) {
  Passes<T> passes;
  passes.rows.rows = in.rows;
  passes.rows.vocab = static_cast<int>(in.vocab);
  const Address data[] = {in.masked, in.predicted};
  const int64_t strides[] = {in.masked_stride, in.predicted_stride};
  for (int i = 0; i < 2; ++i) {
    if (data[i] == 0) continue;
    passes.rows.logits[passes.count] = pointer<T>(data[i]);
    passes.rows.row_stride[passes.count++] = strides[i];
  }
  return passes;
}

static LossOutput output_of(const LossInput& in, Address loss_masked, Address loss_predicted,
                            Address lse_masked, Address lse_predicted) {
  const bool first = in.masked != 0;
  return {{pointer<float>(first ? loss_masked : loss_predicted), pointer<float>(loss_predicted)},
          {pointer<float>(first ? lse_masked : lse_predicted), pointer<float>(lse_predicted)}};
}

Chosen oput_loss(Gpu gpu, LossInput in, Address loss_masked, Address loss_predicted,
                 Address logsumexp_masked, Address logsumexp_predicted) {
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    const Passes<T> passes = passes_of<T>(in);
    const RowWork work{in.rows * passes.count, in.vocab, loss_resident(options_of(in))};
    const LossOutput out =
        output_of(in, loss_masked, loss_predicted, logsumexp_masked, logsumexp_predicted);
    result = launch_rows<T, LossPartial>(gpu, work, [&](const RowLaunch& run) {
      launch_oput_loss(run, passes.rows, targets_of(in), options_of(in), out, Stream{});
    });
  });
  return result;
}

Chosen oput_loss_backward(LossInput in, Address grad_loss, Address logsumexp, Address grad_logits) {
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    launch_oput_loss_backward(
        pointer<const T>(in.masked), in.masked_stride, in.rows, static_cast<int>(in.vocab),
        targets_of(in), options_of(in),
        LossBackwardInputs{pointer<const float>(grad_loss), pointer<const float>(logsumexp)},
        pointer<T>(grad_logits), Stream{});
  });
  return {};
}

Chosen oput_loss_and_grad_(Gpu gpu, LossInput in, Address grad_masked, Address grad_predicted,
                           Address loss_masked, Address loss_predicted) {
  Chosen result;
  dispatch(in.dtype, [&](auto element) {
    using T = decltype(element);
    const Passes<T> passes = passes_of<T>(in);
    const LossAndGradLaunch launch =
        choose_loss_and_grad_launch<T>(in.rows * passes.count, in.vocab, device_of(gpu));
    const bool first = in.masked != 0;
    const LossGrad grad{{pointer<const float>(first ? grad_masked : grad_predicted),
                         pointer<const float>(grad_predicted)}};
    launch_loss_and_grad(launch, passes.rows, targets_of(in), options_of(in), grad,
                         output_of(in, loss_masked, loss_predicted, 0, 0), Stream{});
    result = {1, launch.cluster, launch.shape.blocks, launch.shape.threads};
  });
  return result;
}

}  // namespace dmax::cuda
