#include "checks/rows.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/topk_rows.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor> topk_confidence(Tensor logits, int64_t k, double temperature,
                                           int64_t suppress_token) {
  const int64_t vocab = check_topk_confidence(logits, k, temperature, suppress_token);
  Sizes out_sizes = leading_sizes(logits);
  out_sizes.push_back(k);
  Tensor tokens = empty_like_device(logits, out_sizes, ScalarType::Long);
  Tensor confidences = empty_like_device(logits, out_sizes, ScalarType::Float);
  const RowView view = row_view(logits);
  int64_t* tokens_out = tokens.mutable_data_ptr<int64_t>();
  float* confidences_out = confidences.mutable_data_ptr<float>();

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const VocabScan scan{vocab, suppress_token, temperature};
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t row) { return data + row * view.row_stride; };
    scan_rows<T>(view.rows, scan, row_of, [&](int64_t row, const RowStats& stats) {
      const TopK best = top_k_of_row(tile_kernels<T>(), row_of(row), scan, k);
      top_k_confidences(best, stats, scan, k, tokens_out + row * k, confidences_out + row * k);
    });
  });
  return {tokens, confidences};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("topk_confidence", TORCH_BOX(&dmax::cpu::topk_confidence));
}
