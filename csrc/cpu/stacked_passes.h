// Rows of the masked and of the predicted pass as one matrix, without those that have no target.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/cross_entropy.h"
#include "cpu/simd/tile_kernels.h"

namespace dmax::cpu {

constexpr int kPasses = 2;  // masked, predicted

struct StackedRow {
  int pass;
  int64_t row;
};

// The hidden states or the logits of both passes, and which of their rows count
struct StackedRows {
  std::array<std::optional<RowView>, kPasses> passes;
  std::vector<StackedRow> rows;

  int64_t size() const { return static_cast<int64_t>(rows.size()); }

  template <class T>
  const T* row(int64_t i) const {
    const RowView& view = *passes[rows[i].pass];
    return static_cast<const T*>(view.tensor.const_data_ptr()) + rows[i].row * view.row_stride;
  }
};

inline StackedRows stacked_rows(const OptionalTensor& masked, const OptionalTensor& predicted,
                                const Tensor& target_ids, int64_t ignore_index) {
  StackedRows stacked;
  const std::vector<int64_t> with_target = rows_with_target(target_ids, ignore_index);
  int pass = 0;
  for (const OptionalTensor& given : {masked, predicted}) {
    if (given) {
      stacked.passes[pass] = row_view(*given);
      for (const int64_t row : with_target) stacked.rows.push_back({pass, row});
    }
    ++pass;
  }
  return stacked;
}

// Stacked rows [from, from + count) in their own dtype
inline void gather_rows(const StackedRows& stacked, int64_t from, int64_t count,
                        const Tensor& out) {
  dispatch_float(out.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t dim = out.size(1);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(stacked.row<T>(from + i), dim, data + i * dim);
    }
  });
}

// All stacked rows in float32
inline Tensor widened_rows(const StackedRows& stacked, const Tensor& weight) {
  const int64_t dim = weight.size(1);
  Tensor wide = empty_like_device(weight, {stacked.size(), dim}, ScalarType::Float);
  float* data = wide.mutable_data_ptr<float>();
  dispatch_float(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    for (int64_t i = 0; i < stacked.size(); ++i) {
      tile_kernels<T>().widen(data + i * dim, stacked.row<T>(i), dim);
    }
  });
  return wide;
}

// Puts float32 rows back in their places in both passes' gradients; other rows are 0
inline std::array<Tensor, kPasses> scattered_gradients(
    const StackedRows& stacked, const std::array<OptionalTensor, kPasses>& hidden,
    const std::array<bool, kPasses>& needed, const Tensor& weight, const Tensor& rows) {
  std::array<Tensor, kPasses> grads;
  std::array<void*, kPasses> data{};
  for (int pass = 0; pass < kPasses; ++pass) {
    const bool wanted = needed[pass] && hidden[pass];
    grads[pass] = torch::stable::new_zeros(weight, wanted ? sizes_of(*hidden[pass]) : Sizes{0},
                                           weight.scalar_type());
    if (wanted) data[pass] = grads[pass].mutable_data_ptr();
  }
  if (rows.numel() == 0) return grads;
  const int64_t dim = rows.size(1);
  const float* values = rows.const_data_ptr<float>();
  dispatch_float(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    for (int64_t i = 0; i < stacked.size(); ++i) {
      const auto [pass, row] = stacked.rows[i];
      if (data[pass] == nullptr) continue;
      T* out = static_cast<T*>(data[pass]) + row * dim;
      tile_kernels<T>().store_scaled(out, values + i * dim, 1.0f, dim);
    }
  });
  return grads;
}

}  // namespace dmax::cpu
