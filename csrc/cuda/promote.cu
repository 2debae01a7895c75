#include "cuda/promote.cuh"

#include "checks/step.h"
#include "cuda/host.h"

namespace dmax::cuda {

Tensor prefix_promote(Tensor confidence, Tensor masked, double threshold, bool inclusive) {
  const auto sizes = check_prefix_promote(confidence, masked, threshold, inclusive);
  const Call call("prefix_promote", confidence);
  Tensor promoted = empty_like_device(masked, sizes_of(masked), ScalarType::Bool);
  if (sizes.rows == 0) return promoted;
  const RowView confidences = row_view(confidence);
  const RowView masks = row_view(masked);
  const PrefixPromoteArgs args{static_cast<const float*>(confidences.tensor.const_data_ptr()),
                               static_cast<const bool*>(masks.tensor.const_data_ptr()),
                               promoted.mutable_data_ptr<bool>(),
                               sizes.rows,
                               static_cast<int>(sizes.block),
                               confidences.row_stride,
                               masks.row_stride,
                               static_cast<float>(threshold),
                               inclusive};
  call.check(
      launch(warps_shape(sizes.rows, kPromoteWarps), call.stream, prefix_promote_kernel, args));
  return promoted;
}

}  // namespace dmax::cuda

STABLE_TORCH_LIBRARY_IMPL(dmax, CUDA, m) {
  m.impl("prefix_promote", TORCH_BOX(&dmax::cuda::prefix_promote));
}
