#include "checks/rows.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/vocab_stats.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor> top1_confidence(Tensor logits, double temperature,
                                           int64_t suppress_token) {
  const int64_t vocab = check_top1_confidence(logits, temperature, suppress_token);
  Tensor token = empty_like_device(logits, leading_sizes(logits), ScalarType::Long);
  Tensor confidence = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  const RowView view = row_view(logits);
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    scan_rows<T>(
        view.rows, {vocab, suppress_token, temperature},
        [&](int64_t row) { return data + row * view.row_stride; },
        [&](int64_t row, const RowStats& stats) {
          token_out[row] = stats.token;
          confidence_out[row] = stats.confidence();
        });
  });
  return {token, confidence};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("top1_confidence", TORCH_BOX(&dmax::cpu::top1_confidence));
}
