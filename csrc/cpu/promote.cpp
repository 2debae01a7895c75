#include "checks/step.h"

#include "common/torch_stable.h"
#include "cpu/parallel.h"
#include "cpu/promotion.h"

namespace dmax::cpu {

Tensor prefix_promote(Tensor confidence, Tensor masked, double threshold, bool inclusive) {
  const auto sizes = check_prefix_promote(confidence, masked, threshold, inclusive);
  Tensor promoted = empty_like_device(confidence, sizes_of(confidence), ScalarType::Bool);
  const Tensor c = as_contiguous(confidence);
  const Tensor m = as_contiguous(masked);
  const float* c_data = c.const_data_ptr<float>();
  const bool* m_data = m.const_data_ptr<bool>();
  bool* out = promoted.mutable_data_ptr<bool>();

  constexpr int64_t kGrain = 16384;  // positions per thread; fewer are not worth waking one
  parallel_for(sizes.rows, kGrain / std::max<int64_t>(sizes.block, 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   const int64_t at = row * sizes.block;
                   promote_prefix(c_data + at, m_data + at, sizes.block,
                                  static_cast<float>(threshold), inclusive, out + at);
                 }
               });
  return promoted;
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("prefix_promote", TORCH_BOX(&dmax::cpu::prefix_promote));
}
