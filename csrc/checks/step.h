// Ops of a decoding step after the top-1: prefix_promote, hybrid_embedding, spd_step_, edit_step_.
#pragma once

#include "checks/rows.h"
#include "common/memory_overlap.h"
#include "common/semantics.h"

namespace dmax {

struct PromoteSizes {
  int64_t rows;
  int64_t block;
};

// confidence and masked are [..., K]
inline PromoteSizes check_prefix_promote(const Tensor& confidence, const Tensor& masked,
                                         double threshold, bool /*inclusive*/) {
  constexpr const char* op = "prefix_promote";
  check_dtype(op, "confidence", confidence, ScalarType::Float);
  check_dtype(op, "masked", masked, ScalarType::Bool);
  DMAX_CHECK(confidence.dim() >= 1, op, ": confidence must be [..., K], got a 0-D tensor");
  check_shape(op, "masked", masked, confidence.sizes(), "that of confidence");
  check_same_device(op, "masked", masked, "confidence", confidence);
  check_threshold(op, "threshold", threshold);
  const int64_t block = confidence.size(confidence.dim() - 1);
  return {block == 0 ? 0 : confidence.numel() / block, block};
}

struct EmbeddingSizes {
  int64_t vocab;
  int64_t dim;        // D
  int64_t positions;  // product of masked's sizes
  int64_t k;          // tokens per position
};

// embedding [V, D], token and confidence [...] or [..., k], masked [...]
inline EmbeddingSizes check_mixture(const char* op, const Tensor& embedding, const Tensor& token,
                                    const Tensor& confidence, const Tensor& masked,
                                    int64_t mask_token_id) {
  check_float(op, "embedding", embedding);
  DMAX_CHECK(embedding.dim() == 2 && embedding.size(0) >= 1 && embedding.size(1) >= 1, op,
             ": embedding must be [V, D] with V, D >= 1, got ", shape_text(embedding.sizes()));
  check_integer(op, "token", token);
  check_dtype(op, "confidence", confidence, ScalarType::Float);
  check_dtype(op, "masked", masked, ScalarType::Bool);
  const bool top_1 = token.dim() == masked.dim();
  Sizes need = sizes_of(masked);
  if (!top_1) need.push_back(token.dim() > 0 ? token.size(token.dim() - 1) : 1);
  check_shape(op, "token", token, need, "the shape of masked, optionally followed by k");
  check_shape(op, "confidence", confidence, token.sizes(), "that of token");
  check_mask_token_id(op, mask_token_id, embedding.size(0));
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"token", token},
                                {"confidence", confidence},
                                {"masked", masked}}) {
    check_same_device(op, name, t, "embedding", embedding);
  }
  const int64_t k = top_1 ? 1 : need.back();
  DMAX_CHECK(k >= 1 && k <= kMaxTopK, op, ": token must hold 1..", kMaxTopK,
             " tokens per position, got ", k);
  return {embedding.size(0), embedding.size(1), masked.numel(), k};
}

inline EmbeddingSizes check_hybrid_embedding(const Tensor& embedding, const Tensor& token,
                                             const Tensor& confidence, const Tensor& masked,
                                             int64_t mask_token_id) {
  return check_mixture("hybrid_embedding", embedding, token, confidence, masked, mask_token_id);
}

inline EmbeddingSizes check_hybrid_embedding_backward(const Tensor& grad_output,
                                                      const Tensor& embedding, const Tensor& token,
                                                      const Tensor& confidence,
                                                      const Tensor& masked, int64_t mask_token_id) {
  constexpr const char* op = "hybrid_embedding_backward";
  const EmbeddingSizes sizes =
      check_mixture(op, embedding, token, confidence, masked, mask_token_id);
  Sizes need = sizes_of(masked);
  need.push_back(sizes.dim);
  check_shape(op, "grad_output", grad_output, need, "that of the output");
  check_dtype(op, "grad_output", grad_output, embedding.scalar_type());
  check_same_device(op, "grad_output", grad_output, "embedding", embedding);
  return sizes;
}

struct BlockSizes {
  int64_t batch;  // B
  int64_t block;  // K
  int64_t vocab;  // V
};

inline BlockSizes check_block_logits(const char* op, const Tensor& logits) {
  const int64_t vocab = check_logits(op, "logits", logits);
  DMAX_CHECK(logits.dim() == 3 && logits.size(1) >= 1, op,
             ": logits must be [B, K, V] with K >= 1, got ", shape_text(logits.sizes()));
  return {logits.size(0), logits.size(1), vocab};
}

// A buffer of a block's state, on the logits' device
struct StepBuffer {
  const char* name;
  const Tensor& tensor;
  ScalarType dtype;
  Sizes sizes;
  const char* meaning;
};

inline void check_step_buffers(const char* op, std::initializer_list<StepBuffer> buffers,
                               const Tensor& logits) {
  for (const StepBuffer& buffer : buffers) {
    check_dtype(op, buffer.name, buffer.tensor, buffer.dtype);
    check_shape(op, buffer.name, buffer.tensor, buffer.sizes, buffer.meaning);
    check_same_device(op, buffer.name, buffer.tensor, "logits", logits);
    check_contiguous(op, buffer.name, buffer.tensor);
  }
}

inline void check_row_thresholds(const char* op, const OptionalTensor& thresholds, int64_t batch,
                                 const char* meaning, const Tensor& logits) {
  if (!thresholds) return;
  check_dtype(op, "thresholds", *thresholds, ScalarType::Float);
  check_shape(op, "thresholds", *thresholds, Sizes{batch, 2}, meaning);
  check_same_device(op, "thresholds", *thresholds, "logits", logits);
}

struct StepSizes {
  int64_t batch;  // B
  int64_t block;  // K
  int64_t vocab;  // V
  int64_t dim;    // D
};

// logits [B, K, V], embedding [V, D], and the block's state: seven buffers on one device
// (dmax_kernels/decoding/state.py)
inline StepSizes check_spd_step_(const Tensor& logits, const Tensor& embedding,
                                 const Tensor& editable, const Tensor& masked, const Tensor& token,
                                 const Tensor& confidence, const Tensor& converged,
                                 const Tensor& step, const Tensor& inputs_embeds,
                                 int64_t mask_token_id, double tau_dec, double tau_acc,
                                 int64_t semantics, int64_t top_k, double temperature,
                                 int64_t suppress_token, const OptionalTensor& thresholds,
                                 const OptionalTensor& allowed) {
  constexpr const char* op = "spd_step_";
  const auto [batch, block, vocab] = check_block_logits(op, logits);
  check_float(op, "embedding", embedding);
  DMAX_CHECK(embedding.dim() == 2 && embedding.size(0) == vocab && embedding.size(1) >= 1, op,
             ": embedding must be [V, D] with V = ", vocab, " as in logits and D >= 1, got ",
             shape_text(embedding.sizes()));
  const int64_t dim = embedding.size(1);
  check_same_device(op, "embedding", embedding, "logits", logits);

  const Sizes per_position{batch, block};
  const Sizes per_row{batch};
  check_step_buffers(op,
                     {
                         {"editable", editable, ScalarType::Bool, per_position, "[B, K]"},
                         {"masked", masked, ScalarType::Bool, per_position, "[B, K]"},
                         {"token", token, ScalarType::Long, per_position, "[B, K]"},
                         {"confidence", confidence, ScalarType::Float, per_position, "[B, K]"},
                         {"converged", converged, ScalarType::Bool, per_row, "[B]"},
                         {"step", step, ScalarType::Int, per_row, "[B]"},
                         {"inputs_embeds",
                          inputs_embeds,
                          embedding.scalar_type(),
                          {batch, block, dim},
                          "[B, K, D]"},
                     },
                     logits);
  check_row_thresholds(op, thresholds, batch, "tau_dec and tau_acc of each row", logits);
  check_mask_token_id(op, mask_token_id, vocab);
  check_threshold(op, "tau_dec", tau_dec);
  check_threshold(op, "tau_acc", tau_acc);
  DMAX_CHECK(semantics >= 0 && semantics <= static_cast<int64_t>(Semantics::kReleased), op,
             ": semantics must be 0 (settled), 1 (paper) or 2 (released), got ", semantics);
  check_top_k(op, "top_k", top_k, vocab);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, vocab);
  if (allowed) check_allowed(op, *allowed, vocab, "logits", logits);
  check_no_overlap(op,
                   {{"masked", &masked},
                    {"token", &token},
                    {"confidence", &confidence},
                    {"converged", &converged},
                    {"step", &step},
                    {"inputs_embeds", &inputs_embeds}},
                   {{"logits", &logits},
                    {"embedding", &embedding},
                    {"editable", &editable},
                    {"thresholds", thresholds ? &*thresholds : nullptr},
                    {"allowed", allowed ? &*allowed : nullptr}});
  return {batch, block, vocab, dim};
}

// logits [B, K, V], and a block's state: six buffers on one device
inline BlockSizes check_edit_step_(const Tensor& logits, const Tensor& editable,
                                   const Tensor& token, const Tensor& prediction,
                                   const Tensor& confidence, const Tensor& post_edit_steps,
                                   const Tensor& done, int64_t mask_token_id, double threshold,
                                   double edit_threshold, int64_t rule, int64_t tokens_per_step,
                                   int64_t max_post_edit_steps, double temperature,
                                   int64_t suppress_token, const OptionalTensor& thresholds,
                                   const OptionalTensor& allowed) {
  constexpr const char* op = "edit_step_";
  const BlockSizes sizes = check_block_logits(op, logits);
  const Sizes per_position{sizes.batch, sizes.block};
  const Sizes per_row{sizes.batch};
  check_step_buffers(op,
                     {
                         {"editable", editable, ScalarType::Bool, per_position, "[B, K]"},
                         {"token", token, ScalarType::Long, per_position, "[B, K]"},
                         {"prediction", prediction, ScalarType::Long, per_position, "[B, K]"},
                         {"confidence", confidence, ScalarType::Float, per_position, "[B, K]"},
                         {"post_edit_steps", post_edit_steps, ScalarType::Int, per_row, "[B]"},
                         {"done", done, ScalarType::Bool, per_row, "[B]"},
                     },
                     logits);
  check_row_thresholds(op, thresholds, sizes.batch, "threshold and edit_threshold of each row",
                       logits);
  // It is compared and never looked up, so logits without the mask's column are fine
  DMAX_CHECK(mask_token_id >= 0, op, ": mask_token_id must be a token id, got ", mask_token_id);
  check_threshold(op, "threshold", threshold);
  check_threshold(op, "edit_threshold", edit_threshold);
  DMAX_CHECK(rule >= 0 && rule <= static_cast<int64_t>(EditRule::kDinferThreshold), op,
             ": rule must be 0 (threshold), 1 (low_confidence), 2 (joint_threshold) or 3 "
             "(dinfer_threshold), got ",
             rule);
  DMAX_CHECK(tokens_per_step >= 1, op, ": tokens_per_step must be at least 1, got ",
             tokens_per_step);
  constexpr int64_t kMostSteps = (int64_t{1} << 31) - 1;
  DMAX_CHECK(max_post_edit_steps >= 0 && max_post_edit_steps <= kMostSteps, op,
             ": max_post_edit_steps must be in 0..", kMostSteps, ", got ", max_post_edit_steps);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, sizes.vocab);
  if (allowed) check_allowed(op, *allowed, sizes.vocab, "logits", logits);
  check_no_overlap(op,
                   {{"token", &token},
                    {"prediction", &prediction},
                    {"confidence", &confidence},
                    {"post_edit_steps", &post_edit_steps},
                    {"done", &done}},
                   {{"logits", &logits},
                    {"editable", &editable},
                    {"thresholds", thresholds ? &*thresholds : nullptr},
                    {"allowed", allowed ? &*allowed : nullptr}});
  return sizes;
}

}  // namespace dmax
