#include "cuda/loss_and_grad.cuh"

#include "checks/loss.h"
#include "cuda/host.h"

namespace dmax::cuda {

namespace {

struct Pass {
  RowView rows;
  Tensor loss, logsumexp;
  OptionalTensor grad;
};

// `target` is contiguous
Targets targets_of(const Tensor& target) {
  return {target.const_data_ptr(), target.scalar_type() == ScalarType::Long};
}

template <class T>
LossRows<T> loss_rows(const std::vector<Pass>& passes) {
  LossRows<T> rows{};
  rows.rows = passes[0].rows.rows;
  rows.vocab = static_cast<int>(passes[0].rows.width);
  for (size_t i = 0; i < passes.size(); ++i) {
    // oput_loss only reads, but its kernel takes the same view as the one that writes in place
    rows.logits[i] = static_cast<T*>(const_cast<void*>(passes[i].rows.tensor.const_data_ptr()));
    rows.row_stride[i] = passes[i].rows.row_stride;
  }
  return rows;
}

LossOutput loss_output(const std::vector<Pass>& passes, bool with_logsumexp) {
  LossOutput out{};
  for (size_t i = 0; i < passes.size(); ++i) {
    out.loss[i] = passes[i].loss.mutable_data_ptr<float>();
    if (with_logsumexp) out.logsumexp[i] = passes[i].logsumexp.mutable_data_ptr<float>();
  }
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> oput_loss(OptionalTensor logits_masked,
                                                     OptionalTensor logits_predicted, Tensor target,
                                                     int64_t ignore_index, double label_smoothing,
                                                     double z_loss, double temperature) {
  constexpr const char* op = "oput_loss";
  const int64_t vocab = check_oput_loss(logits_masked, logits_predicted, target, ignore_index,
                                        label_smoothing, z_loss, temperature);
  const Tensor& like = logits_masked ? *logits_masked : *logits_predicted;
  const Call call(op, like);
  std::vector<Pass> passes;
  Tensor out[4];  // both losses, both logsumexps
  for (int i = 0; i < 2; ++i) {
    const OptionalTensor& logits = i == 0 ? logits_masked : logits_predicted;
    const Sizes shape = logits ? sizes_of(target) : Sizes{0};
    out[i] = empty_like_device(like, shape, ScalarType::Float);
    out[2 + i] = empty_like_device(like, shape, ScalarType::Float);
    if (logits) passes.push_back({row_view(*logits), out[i], out[2 + i], {}});
  }
  const Tensor targets = as_contiguous(target);
  const LossOptions options = make_loss_options(ignore_index, label_smoothing, z_loss, temperature);
  const int64_t rows = passes[0].rows.rows * static_cast<int64_t>(passes.size());
  if (rows > 0) {
    dispatch_float(like.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const RowWork work{rows, vocab, loss_resident(options)};
      launch_rows<T, LossPartial>(call, like, work, [&](const RowLaunch& run) {
        return launch_oput_loss(run, loss_rows<T>(passes), targets_of(targets), options,
                                loss_output(passes, true), call.stream);
      });
    });
  }
  return {out[0], out[1], out[2], out[3]};
}

Tensor oput_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor logsumexp,
                          int64_t ignore_index, double label_smoothing, double z_loss,
                          double temperature) {
  const int64_t vocab = check_oput_loss_backward(grad_loss, logits, target, logsumexp, ignore_index,
                                                 label_smoothing, z_loss, temperature);
  const Call call("oput_loss_backward", logits);
  Tensor grad_logits = empty_like_device(logits, sizes_of(logits), logits.scalar_type());
  const RowView view = row_view(logits);
  if (view.rows == 0) return grad_logits;
  const Tensor targets = as_contiguous(target);
  const Tensor grads = as_contiguous(grad_loss);  // an expanded 1 comes with stride 0
  const Tensor log_sums = as_contiguous(logsumexp);
  const LossOptions options = make_loss_options(ignore_index, label_smoothing, z_loss, temperature);
  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    call.check_blocks(view.rows * backward_blocks_per_row<T>(vocab));
    call.check(launch_oput_loss_backward(
        static_cast<const T*>(view.tensor.const_data_ptr()), view.row_stride, view.rows,
        static_cast<int>(vocab), targets_of(targets), options,
        LossBackwardInputs{grads.const_data_ptr<float>(), log_sums.const_data_ptr<float>()},
        static_cast<T*>(grad_logits.mutable_data_ptr()), call.stream));
  });
  return grad_logits;
}

std::tuple<Tensor, Tensor> oput_loss_and_grad_(OptionalTensor logits_masked,
                                               OptionalTensor logits_predicted, Tensor target,
                                               OptionalTensor grad_masked,
                                               OptionalTensor grad_predicted, int64_t ignore_index,
                                               double label_smoothing, double z_loss,
                                               double temperature) {
  constexpr const char* op = "oput_loss_and_grad_";
  const int64_t vocab =
      check_oput_loss_and_grad_(logits_masked, logits_predicted, target, grad_masked,
                                grad_predicted, ignore_index, label_smoothing, z_loss, temperature);
  const Tensor& like = logits_masked ? *logits_masked : *logits_predicted;
  const Call call(op, like);
  std::vector<Pass> passes;
  Tensor losses[2];
  for (int i = 0; i < 2; ++i) {
    const OptionalTensor& logits = i == 0 ? logits_masked : logits_predicted;
    const OptionalTensor& grad = i == 0 ? grad_masked : grad_predicted;
    losses[i] = empty_like_device(like, logits ? sizes_of(target) : Sizes{0}, ScalarType::Float);
    if (!logits) continue;
    Pass pass{row_view(*logits), losses[i], losses[i], {}};
    if (grad) pass.grad = as_contiguous(*grad);
    passes.push_back(pass);
  }
  const Tensor targets = as_contiguous(target);
  const LossOptions options = make_loss_options(ignore_index, label_smoothing, z_loss, temperature);
  LossGrad grads{};
  for (size_t i = 0; i < passes.size(); ++i) {
    if (passes[i].grad) grads.scale[i] = passes[i].grad->const_data_ptr<float>();
  }
  const int64_t rows = passes[0].rows.rows * static_cast<int64_t>(passes.size());
  if (rows > 0) {
    dispatch_float(like.scalar_type(), [&](auto element) {
      using T = decltype(element);
      call.check_blocks(rows * 8);
      const LossAndGradLaunch chosen = choose_loss_and_grad_launch<T>(rows, vocab, call.device);
      DMAX_CHECK(static_cast<int>(chosen.shape.shared_bytes) <= call.device.max_shared_per_block,
                 op, ": V is too large for one block's shared memory, got ", vocab);
      call.check(launch_loss_and_grad(chosen, loss_rows<T>(passes), targets_of(targets), options,
                                      grads, loss_output(passes, false), call.stream));
    });
  }
  return {losses[0], losses[1]};
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("oput_loss", TORCH_BOX(&dmax::cuda::oput_loss));
  m.impl("oput_loss_backward", TORCH_BOX(&dmax::cuda::oput_loss_backward));
  m.impl("oput_loss_and_grad_", TORCH_BOX(&dmax::cuda::oput_loss_and_grad_));
}
