// Log-probabilities and ranks of given tokens, and the most likely tokens beside them.
#include "cpu/logprob_rows.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/cross_entropy.h"

namespace dmax::cpu {

LogprobTensors token_logprobs(Tensor logits, Tensor ids, double temperature, int64_t top_n,
                              int64_t ignore_index, OptionalTensor allowed) {
  const auto [vocab, per_row] =
      check_token_logprobs(logits, ids, temperature, top_n, ignore_index, allowed);
  const Tensor tokens = checked_targets("token_logprobs", ids, vocab, ignore_index, "ids");
  const LogprobRows rows(logits, ids, tokens, per_row, {vocab, -1, temperature}, top_n,
                         ignore_index);
  const AllowedMask mask(allowed, vocab);
  const RowView view = row_view(logits);
  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    rows.report<T>(0, view.rows, [&](int64_t row) {
      return ScannedRow<T>(data + row * view.row_stride, mask.row(row));
    });
  });
  return rows.tensors();
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&dmax::cpu::token_logprobs));
}
