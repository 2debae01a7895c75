// spd_step_(logits [B, K, V], embedding [V, D], state): one SPD step in place on static buffers
#pragma once

#include "common/semantics.h"
#include "common/tensor_checks.h"
#include "ops/topk_confidence.h"

namespace dmax {

struct SpdStepSizes {
  int64_t batch;  // B
  int64_t block;  // K
  int64_t vocab;  // V
  int64_t dim;    // D
};

// The block state, all on one device and contiguous (dmax_kernels/decoding/state.py)
struct SpdState {
  const Tensor& editable;       // bool [B, K]
  const Tensor& masked;         // bool [B, K], written
  const Tensor& token;          // i64 [B, K], written
  const Tensor& confidence;     // f32 [B, K], written
  const Tensor& converged;      // bool [B], written
  const Tensor& step;           // i32 [B], written
  const Tensor& inputs_embeds;  // [B, K, D], embedding's dtype, written
};

inline Semantics semantics_of(int64_t code) {
  DMAX_CHECK(code >= 0 && code <= static_cast<int64_t>(Semantics::kReleased),
             "spd_step_: semantics must be 0 (settled), 1 (paper) or 2 (released), got ", code);
  return static_cast<Semantics>(code);
}

inline SpdStepSizes check_spd_step_(const Tensor& logits, const Tensor& embedding,
                                    const SpdState& state, int64_t mask_token_id, double tau_dec,
                                    double tau_acc, int64_t top_k, double temperature,
                                    int64_t suppress_token, const OptionalTensor& thresholds) {
  constexpr const char* op = "spd_step_";
  const int64_t vocab = check_logits(op, "logits", logits);
  DMAX_CHECK(logits.dim() == 3 && logits.size(1) >= 1, op,
             ": logits must be [B, K, V] with K >= 1, got ", shape_text(logits.sizes()));
  const int64_t batch = logits.size(0);
  const int64_t block = logits.size(1);
  check_float(op, "embedding", embedding);
  DMAX_CHECK(embedding.dim() == 2 && embedding.size(0) == vocab && embedding.size(1) >= 1, op,
             ": embedding must be [V, D] with V = ", vocab, " as in logits and D >= 1, got ",
             shape_text(embedding.sizes()));
  const int64_t dim = embedding.size(1);
  check_same_device(op, "embedding", embedding, "logits", logits);

  struct Buffer {
    const char* name;
    const Tensor& tensor;
    ScalarType dtype;
    Sizes sizes;
    const char* meaning;
  };
  const Sizes per_position{batch, block};
  const Sizes per_row{batch};
  const Buffer buffers[] = {
      {"editable", state.editable, ScalarType::Bool, per_position, "[B, K]"},
      {"masked", state.masked, ScalarType::Bool, per_position, "[B, K]"},
      {"token", state.token, ScalarType::Long, per_position, "[B, K]"},
      {"confidence", state.confidence, ScalarType::Float, per_position, "[B, K]"},
      {"converged", state.converged, ScalarType::Bool, per_row, "[B]"},
      {"step", state.step, ScalarType::Int, per_row, "[B]"},
      {"inputs_embeds",
       state.inputs_embeds,
       embedding.scalar_type(),
       {batch, block, dim},
       "[B, K, D]"},
  };
  for (const Buffer& buffer : buffers) {
    check_dtype(op, buffer.name, buffer.tensor, buffer.dtype);
    check_shape(op, buffer.name, buffer.tensor, buffer.sizes, buffer.meaning);
    check_same_device(op, buffer.name, buffer.tensor, "logits", logits);
    check_contiguous(op, buffer.name, buffer.tensor);
  }
  if (thresholds) {
    check_dtype(op, "thresholds", *thresholds, ScalarType::Float);
    check_shape(op, "thresholds", *thresholds, Sizes{batch, 2}, "tau_dec and tau_acc of each row");
    check_same_device(op, "thresholds", *thresholds, "logits", logits);
  }
  check_mask_token_id(op, mask_token_id, vocab);
  check_threshold(op, "tau_dec", tau_dec);
  check_threshold(op, "tau_acc", tau_acc);
  check_top_k(op, "top_k", top_k, vocab);
  check_temperature(op, temperature);
  check_suppress_token(op, suppress_token, vocab);
  return {batch, block, vocab, dim};
}

}  // namespace dmax
