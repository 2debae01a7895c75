// Tensors of the embedding ops as what hybrid_rows.cuh takes.
#pragma once

#include "cuda/host.h"
#include "cuda/hybrid_embedding.cuh"

namespace dmax::cuda {

inline ElementType element_type(ScalarType dtype) {
  return dtype == ScalarType::Float      ? ElementType::kFloat
         : dtype == ScalarType::BFloat16 ? ElementType::kBFloat16
                                         : ElementType::kFloat16;
}

// `rows`: the contiguous [..., D] that is written, or read beside the table
inline EmbeddingTable embedding_table(const RowView& embedding, int64_t mask_token_id,
                                      const Tensor& rows) {
  return make_table(embedding.tensor.const_data_ptr(), embedding.row_stride, embedding.rows,
                    embedding.width, mask_token_id, element_type(embedding.tensor.scalar_type()),
                    rows.const_data_ptr());
}

// token, confidence and masked made contiguous, and kept alive
struct MixTensors {
  Tensor token, confidence, masked;

  HybridArgs args(const EmbeddingTable& table, int64_t positions, int64_t k) const {
    return {table,
            token.const_data_ptr(),
            confidence.const_data_ptr<float>(),
            masked.const_data_ptr<bool>(),
            positions,
            static_cast<int>(k),
            token.scalar_type() == ScalarType::Long};
  }
};

inline MixTensors mix_tensors(const Tensor& token, const Tensor& confidence, const Tensor& masked) {
  return {torch::stable::contiguous(token), torch::stable::contiguous(confidence),
          torch::stable::contiguous(masked)};
}

}  // namespace dmax::cuda
