// Every op of torch.ops.dmax. The docstrings in dmax_kernels/ops say what each one computes.
#include <string>

#include "common/torch_stable.h"

namespace {

// Turns `op(Tensor(a!) x) -> Tensor` into `_check_op(Tensor x) -> ()`, since a check writes nothing
std::string check_schema(const std::string& schema) {
  std::string check = "_check_" + schema.substr(0, schema.rfind(" -> ")) + " -> ()";
  constexpr size_t kMarkLength = 4;  // the length of "(a!)"
  for (size_t mark = check.find('!'); mark != std::string::npos; mark = check.find('!')) {
    check.erase(mark - 2, kMarkLength);
  }
  return check;
}

}  // namespace

// Defines each op together with its check, which takes the same arguments (checks/checks.cpp)
STABLE_TORCH_LIBRARY(dmax, m) {
  const auto def = [&m](const char* schema) {
    m.def(schema);
    m.def(check_schema(schema).c_str());
  };
  def("top1_confidence(Tensor logits, *, float temperature=1.0, int suppress_token=-1,"
      " Tensor? allowed=None) -> (Tensor token, Tensor confidence)");
  def("topk_confidence(Tensor logits, int k, *, float temperature=1.0, int suppress_token=-1,"
      " Tensor? allowed=None) -> (Tensor tokens, Tensor confidences)");
  def("row_statistics(Tensor logits, *, float temperature=1.0, Tensor? temperatures=None,"
      " int suppress_token=-1, Tensor? allowed=None) -> (Tensor token, Tensor confidence,"
      " Tensor runner_up, Tensor entropy, Tensor logsumexp)");
  def("token_logprobs(Tensor logits, Tensor ids, *, float temperature=1.0, int top_n=0,"
      " int ignore_index=-100, Tensor? allowed=None) -> (Tensor logprob, Tensor rank,"
      " Tensor top_ids, Tensor top_logprobs, Tensor logsumexp)");
  def("prefix_promote(Tensor confidence, Tensor masked, float threshold, *, bool inclusive=False)"
      " -> Tensor promoted");
  def("hybrid_embedding(Tensor embedding, Tensor token, Tensor confidence, Tensor masked,"
      " int mask_token_id) -> Tensor");
  def("hybrid_embedding_backward(Tensor grad_output, Tensor embedding, Tensor token,"
      " Tensor confidence, Tensor masked, int mask_token_id)"
      " -> (Tensor grad_embedding, Tensor grad_confidence)");
  def("soft_embedding(Tensor logits, Tensor embedding, *, float temperature=1.0,"
      " Tensor? temperatures=None, Tensor? least=None, Tensor? last_id=None) -> Tensor");
  def("soft_embedding_partial(Tensor logits_shard, Tensor embedding_shard, *,"
      " float temperature=1.0, Tensor? temperatures=None, Tensor? least=None,"
      " Tensor? last_id=None) -> (Tensor maximum, Tensor sum_exp, Tensor weighted)");
  def("top_p_cut(Tensor logits, float top_p, *, float temperature=1.0,"
      " Tensor? temperatures=None) -> (Tensor least, Tensor last_id)");
  def("spd_step_(Tensor logits, Tensor embedding, Tensor editable, Tensor(a!) masked,"
      " Tensor(b!) token, Tensor(c!) confidence, Tensor(d!) converged, Tensor(e!) step,"
      " Tensor(f!) inputs_embeds, int mask_token_id, float tau_dec, float tau_acc, *,"
      " int semantics=0, int top_k=1, float temperature=1.0, int suppress_token=-1,"
      " Tensor? thresholds=None, Tensor? allowed=None) -> ()");
  def("edit_step_(Tensor logits, Tensor editable, Tensor(a!) token, Tensor(b!) prediction,"
      " Tensor(c!) confidence, Tensor(d!) post_edit_steps, Tensor(e!) done, int mask_token_id,"
      " float threshold, float edit_threshold, *, int rule=0, int tokens_per_step=1,"
      " int max_post_edit_steps=16, float temperature=1.0, int suppress_token=-1,"
      " Tensor? thresholds=None, Tensor? allowed=None) -> ()");
  def("sample_tokens(Tensor logits, Tensor seed, *, float temperature=1.0, int top_k=0,"
      " float top_p=1.0, float min_p=0.0, Tensor? row_options=None, int suppress_token=-1,"
      " Tensor? allowed=None) -> (Tensor token, Tensor probability, Tensor top1_probability,"
      " Tensor relative_confidence)");
  def("transform_logits_(Tensor(a!) logits, *, float softcap=0.0, Tensor? bias=None,"
      " Tensor? output_counts=None, Tensor? prompt_tokens=None, Tensor? penalties=None,"
      " float repetition_penalty=1.0, float presence_penalty=0.0, float frequency_penalty=0.0)"
      " -> ()");
  def("oput_loss(Tensor? logits_masked, Tensor? logits_predicted, Tensor target, *,"
      " int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, float temperature=1.0)"
      " -> (Tensor loss_masked, Tensor loss_predicted, Tensor logsumexp_masked,"
      " Tensor logsumexp_predicted)");
  def("oput_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor logsumexp, *,"
      " int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, float temperature=1.0)"
      " -> Tensor grad_logits");
  def("oput_loss_and_grad_(Tensor(a!)? logits_masked, Tensor(b!)? logits_predicted, Tensor target,"
      " Tensor? grad_masked=None, Tensor? grad_predicted=None, *, int ignore_index=-100,"
      " float label_smoothing=0.0, float z_loss=0.0, float temperature=1.0)"
      " -> (Tensor loss_masked, Tensor loss_predicted)");
  def("top1_partial(Tensor logits_shard, int vocab_start, *, float temperature=1.0,"
      " int suppress_token=-1, Tensor? allowed=None) -> (Tensor maximum, Tensor sum_exp, Tensor "
      "token)");
  def("top1_merge(Tensor maximum, Tensor sum_exp, Tensor token, *, float temperature=1.0)"
      " -> (Tensor token, Tensor confidence)");
  def("sample_partial(Tensor logits_shard, Tensor seed, int vocab_start, *, float temperature=1.0,"
      " int suppress_token=-1)"
      " -> (Tensor maximum, Tensor sum_exp, Tensor token, Tensor score, Tensor weight)");
  def("sample_merge(Tensor maximum, Tensor sum_exp, Tensor token, Tensor score, Tensor weight, *,"
      " float temperature=1.0) -> (Tensor token, Tensor probability)");
  def("linear_top1_confidence(Tensor hidden, Tensor weight, Tensor? bias=None, *,"
      " float temperature=1.0, int suppress_token=-1, Tensor? allowed=None)"
      " -> (Tensor token, Tensor confidence)");
  def("linear_oput_loss(Tensor? hidden_masked, Tensor? hidden_predicted, Tensor weight,"
      " Tensor target, Tensor? bias=None, *, int ignore_index=-100, float label_smoothing=0.0,"
      " float z_loss=0.0, float temperature=1.0) -> (Tensor loss_masked, Tensor loss_predicted,"
      " Tensor logsumexp_masked, Tensor logsumexp_predicted)");
  def("linear_oput_loss_backward(Tensor grad_masked, Tensor grad_predicted, Tensor? hidden_masked,"
      " Tensor? hidden_predicted, Tensor weight, Tensor target, Tensor logsumexp_masked,"
      " Tensor logsumexp_predicted, Tensor? bias=None, *, int ignore_index=-100,"
      " float label_smoothing=0.0, float z_loss=0.0, float temperature=1.0,"
      " bool needs_masked=True, bool needs_predicted=True, bool needs_weight=True,"
      " bool needs_bias=True) -> (Tensor grad_hidden_masked, Tensor grad_hidden_predicted, Tensor "
      "grad_weight,"
      " Tensor grad_bias)");
  def("linear_oput_loss_sum(Tensor? hidden_masked, Tensor? hidden_predicted, Tensor weight,"
      " Tensor target, Tensor? bias=None, Tensor? factor_masked=None,"
      " Tensor? factor_predicted=None, *, int ignore_index=-100, float label_smoothing=0.0,"
      " float z_loss=0.0, float temperature=1.0, bool needs_masked=True,"
      " bool needs_predicted=True, bool needs_weight=True, bool needs_bias=True)"
      " -> (Tensor total, Tensor by_pass, Tensor logsumexp_masked, Tensor logsumexp_predicted,"
      " Tensor grad_hidden_masked, Tensor grad_hidden_predicted, Tensor grad_weight,"
      " Tensor grad_bias)");
  def("linear_oput_loss_scale_(Tensor(a!) grad, Tensor factor) -> ()");
  def("linear_sample_tokens(Tensor hidden, Tensor weight, Tensor seed, Tensor? bias=None, *,"
      " float temperature=1.0, int top_k=0, float top_p=1.0, float min_p=0.0,"
      " Tensor? row_options=None, int suppress_token=-1, Tensor? allowed=None) -> (Tensor token,"
      " Tensor probability, Tensor top1_probability, Tensor relative_confidence)");
  def("linear_token_logprobs(Tensor hidden, Tensor weight, Tensor ids, Tensor? bias=None, *,"
      " float temperature=1.0, int top_n=0, int ignore_index=-100, Tensor? allowed=None)"
      " -> (Tensor logprob, Tensor rank, Tensor top_ids, Tensor top_logprobs, Tensor logsumexp)");
}
