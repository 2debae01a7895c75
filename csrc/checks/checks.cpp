// `_check_<op>` for every device: what an op requires of its arguments, for kernels that are not
// written in C++. Where those are registered (dmax_kernels/triton/__init__.py), they call it first.
#include <type_traits>

#include "checks/linear.h"
#include "checks/loss.h"
#include "checks/rows.h"
#include "checks/soft_embedding.h"
#include "checks/step.h"
#include "checks/transform.h"

namespace dmax {

namespace {

// The check as a kernel: it takes arguments by value and drops the sizes
template <auto check>
struct CheckKernel;

template <class Result, class... Arguments, Result (*check)(Arguments...)>
struct CheckKernel<check> {
  static void call(std::decay_t<Arguments>... arguments) { check(arguments...); }
};

}  // namespace

}  // namespace dmax

#define DMAX_CHECK_KERNEL(op) \
  m.impl("_check_" #op, TORCH_BOX(&dmax::CheckKernel<&dmax::check_##op>::call))

STABLE_TORCH_LIBRARY_IMPL(dmax, CompositeExplicitAutograd, m) {
  DMAX_CHECK_KERNEL(top1_confidence);
  DMAX_CHECK_KERNEL(topk_confidence);
  DMAX_CHECK_KERNEL(row_statistics);
  DMAX_CHECK_KERNEL(token_logprobs);
  DMAX_CHECK_KERNEL(prefix_promote);
  DMAX_CHECK_KERNEL(hybrid_embedding);
  DMAX_CHECK_KERNEL(hybrid_embedding_backward);
  DMAX_CHECK_KERNEL(soft_embedding);
  DMAX_CHECK_KERNEL(soft_embedding_partial);
  DMAX_CHECK_KERNEL(top_p_cut);
  DMAX_CHECK_KERNEL(spd_step_);
  DMAX_CHECK_KERNEL(edit_step_);
  DMAX_CHECK_KERNEL(sample_tokens);
  DMAX_CHECK_KERNEL(transform_logits_);
  DMAX_CHECK_KERNEL(oput_loss);
  DMAX_CHECK_KERNEL(oput_loss_backward);
  DMAX_CHECK_KERNEL(oput_loss_and_grad_);
  DMAX_CHECK_KERNEL(top1_partial);
  DMAX_CHECK_KERNEL(top1_merge);
  DMAX_CHECK_KERNEL(sample_partial);
  DMAX_CHECK_KERNEL(sample_merge);
  DMAX_CHECK_KERNEL(linear_top1_confidence);
  DMAX_CHECK_KERNEL(linear_oput_loss);
  DMAX_CHECK_KERNEL(linear_oput_loss_backward);
  DMAX_CHECK_KERNEL(linear_oput_loss_sum);
  DMAX_CHECK_KERNEL(linear_oput_loss_scale_);
  DMAX_CHECK_KERNEL(linear_sample_tokens);
  DMAX_CHECK_KERNEL(linear_token_logprobs);
}
