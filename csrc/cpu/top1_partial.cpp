#include "checks/rows.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/vocab_stats.h"

namespace dmax::cpu {

std::tuple<Tensor, Tensor, Tensor> top1_partial(Tensor logits_shard, int64_t vocab_start,
                                                double temperature, int64_t suppress_token) {
  const auto sizes = check_top1_partial(logits_shard, vocab_start, temperature, suppress_token);
  const Sizes out_sizes = leading_sizes(logits_shard);
  Tensor maximum = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, out_sizes, ScalarType::Float);
  Tensor token = empty_like_device(logits_shard, out_sizes, ScalarType::Long);
  const RowView view = row_view(logits_shard);
  float* maximum_out = maximum.mutable_data_ptr<float>();
  float* sum_exp_out = sum_exp.mutable_data_ptr<float>();
  int64_t* token_out = token.mutable_data_ptr<int64_t>();

  dispatch_float(logits_shard.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    scan_rows<T>(
        view.rows, {sizes.vocab, sizes.local_suppress, temperature},
        [&](int64_t row) { return data + row * view.row_stride; },
        [&](int64_t row, const RowStats& stats) {
          const bool empty = stats.maximum == -std::numeric_limits<float>::infinity();
          maximum_out[row] = stats.maximum;
          sum_exp_out[row] = empty ? 0.0f : static_cast<float>(1.0 + stats.rest);
          token_out[row] = vocab_start + stats.token;
        });
  });
  return {maximum, sum_exp, token};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("top1_partial", TORCH_BOX(&dmax::cpu::top1_partial));
}
