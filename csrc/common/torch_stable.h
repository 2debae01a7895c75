// The part of LibTorch's stable ABI that the ops use, under short names.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

// torch 2.13 renamed this macro and kept the old name only in headers that are not part of the
// stable ABI. The new name is used here; torch 2.10 to 2.12 have only the old one.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace dmax {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

// The shape without its last `drop` dimensions: [..., V] -> [...]
inline Sizes leading_sizes(const Tensor& t, int64_t drop = 1) {
  return Sizes(t.sizes().begin(), t.sizes().end() - drop);
}

inline Tensor empty_like_device(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace dmax
