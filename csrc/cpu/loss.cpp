// Cross-entropy of both passes and its gradient, row by row; the softmax is never stored.
#include "checks/loss.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/cross_entropy.h"
#include "cpu/fresh_pages.h"
#include "cpu/stacked_passes.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {

namespace {

template <class T>
double row_loss(const TileKernels<T>& kernels, const T* row, int64_t vocab, int64_t target,
                const RowStats& stats, const LossOptions& options) {
  return loss_of_row(stats.maximum, stats.log_rest(), kernels.value(row + target), options,
                     [&] { return -kernels.sum(row, vocab, stats.maximum) / vocab; });
}

void fill_zero(void* row, int64_t bytes) {
  std::fill_n(static_cast<unsigned char*>(row), bytes, static_cast<unsigned char>(0));
}

// Loss of one pass; every logit is overwritten with its gradient while the row is in the cache
Tensor pass_loss_and_grad_(const OptionalTensor& logits, const OptionalTensor& grad,
                           const Tensor& like, const Tensor& target, const Tensor& target_ids,
                           int64_t vocab, const LossOptions& options) {
  if (!logits) return empty_like_device(like, {0}, ScalarType::Float);
  const RowView view = row_view(*logits);
  Tensor loss = zero_floats(like, sizes_of(target));
  OptionalTensor grad_c;
  if (grad) grad_c = as_contiguous(*grad);
  const float* grads = grad_c ? grad_c->const_data_ptr<float>() : nullptr;
  const int64_t* targets = target_ids.const_data_ptr<int64_t>();
  float* loss_out = loss.mutable_data_ptr<float>();
  dispatch_float(logits->scalar_type(), [&](auto element) {
    using T = decltype(element);
    const TileKernels<T>& kernels = tile_kernels<T>();
    const VocabScan scan{vocab, -1, options.temperature};
    T* data = static_cast<T*>(view.tensor.mutable_data_ptr());
    parallel_for_rows(view.rows, vocab, [&](int64_t begin, int64_t end) {
      std::vector<float> tile_maxima(scan.num_tiles());
      for (int64_t row = begin; row < end; ++row) {
        T* x = data + row * view.row_stride;
        if (targets[row] == options.ignore_index) {
          fill_zero(x, vocab * sizeof(T));
          continue;
        }
        const RowStats stats = scan_row<T>(kernels, x, scan, tile_maxima.data());
        loss_out[row] =
            static_cast<float>(row_loss<T>(kernels, x, vocab, targets[row], stats, options));
        loss_gradient(kernels, x, x, vocab, vocab, targets[row],
                      stats.log_sum_exp(options.temperature), grads ? grads[row] : 1.0f, options);
      }
    });
  });
  return loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> oput_loss(OptionalTensor logits_masked,
                                                     OptionalTensor logits_predicted, Tensor target,
                                                     int64_t ignore_index, double label_smoothing,
                                                     double z_loss, double temperature) {
  constexpr const char* op = "oput_loss";
  const int64_t vocab = check_oput_loss(logits_masked, logits_predicted, target, ignore_index,
                                        label_smoothing, z_loss, temperature);
  const LossOptions options{ignore_index, label_smoothing, z_loss, temperature};
  const Tensor ids = checked_targets(op, target, vocab, ignore_index);
  const Tensor& like = logits_masked ? *logits_masked : *logits_predicted;
  const auto zeros = [&](const OptionalTensor& logits) {
    return zero_floats(like, logits ? sizes_of(target) : Sizes{0});
  };
  const std::array<Tensor, kPasses> loss{zeros(logits_masked), zeros(logits_predicted)};
  const std::array<Tensor, kPasses> logsumexp{zeros(logits_masked), zeros(logits_predicted)};
  float* const loss_out[] = {loss[0].mutable_data_ptr<float>(), loss[1].mutable_data_ptr<float>()};
  float* const logsumexp_out[] = {logsumexp[0].mutable_data_ptr<float>(),
                                  logsumexp[1].mutable_data_ptr<float>()};
  const StackedRows stacked = stacked_rows(logits_masked, logits_predicted, ids, ignore_index);
  const int64_t* targets = ids.const_data_ptr<int64_t>();
  dispatch_float(like.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const TileKernels<T>& kernels = tile_kernels<T>();
    const auto row_of = [&](int64_t i) { return stacked.row<T>(i); };
    scan_rows<T>(
        stacked.size(), {vocab, -1, temperature}, row_of, [&](int64_t i, const RowStats& stats) {
          const auto [pass, row] = stacked.rows[i];
          loss_out[pass][row] =
              static_cast<float>(row_loss(kernels, row_of(i), vocab, targets[row], stats, options));
          logsumexp_out[pass][row] = static_cast<float>(stats.log_sum_exp(temperature));
        });
  });
  return {loss[0], loss[1], logsumexp[0], logsumexp[1]};
}

Tensor oput_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor logsumexp,
                          int64_t ignore_index, double label_smoothing, double z_loss,
                          double temperature) {
  constexpr const char* op = "oput_loss_backward";
  const int64_t vocab = check_oput_loss_backward(grad_loss, logits, target, logsumexp, ignore_index,
                                                 label_smoothing, z_loss, temperature);
  const LossOptions options{ignore_index, label_smoothing, z_loss, temperature};
  const Tensor ids = checked_targets(op, target, vocab, ignore_index);
  Tensor grad_logits = empty_like_device(logits, sizes_of(logits), logits.scalar_type());
  const RowView view = row_view(logits);
  const Tensor grad_c = as_contiguous(grad_loss);  // an expanded 1 comes with stride 0
  const Tensor logsumexp_c = as_contiguous(logsumexp);
  const int64_t* targets = ids.const_data_ptr<int64_t>();
  const float* grads = grad_c.const_data_ptr<float>();
  const float* log_sums = logsumexp_c.const_data_ptr<float>();
  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const TileKernels<T>& kernels = tile_kernels<T>();
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    T* out = static_cast<T*>(grad_logits.mutable_data_ptr());
    parallel_for_rows(view.rows, vocab, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* y = out + row * vocab;
        make_pages(y, vocab * sizeof(T));
        if (targets[row] == ignore_index) {
          fill_zero(y, vocab * sizeof(T));
          continue;
        }
        loss_gradient(kernels, data + row * view.row_stride, y, vocab, vocab, targets[row],
                      log_sums[row], grads[row], options);
      }
    });
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
  const LossOptions options{ignore_index, label_smoothing, z_loss, temperature};
  const Tensor ids = checked_targets(op, target, vocab, ignore_index);
  const Tensor& like = logits_masked ? *logits_masked : *logits_predicted;
  Tensor loss_masked =
      pass_loss_and_grad_(logits_masked, grad_masked, like, target, ids, vocab, options);
  Tensor loss_predicted =
      pass_loss_and_grad_(logits_predicted, grad_predicted, like, target, ids, vocab, options);
  return {loss_masked, loss_predicted};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("oput_loss", TORCH_BOX(&dmax::cpu::oput_loss));
  m.impl("oput_loss_backward", TORCH_BOX(&dmax::cpu::oput_loss_backward));
  m.impl("oput_loss_and_grad_", TORCH_BOX(&dmax::cpu::oput_loss_and_grad_));
}
