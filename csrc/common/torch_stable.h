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

// The C functions below are called directly: torch::stable's finds its operator by name in every
// call, which takes longer than the call. These outlive a release as the stable ABI does.

inline int32_t dtype_number(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// An uninitialised, contiguous tensor on the device of `like`
inline Tensor empty_like_device(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype_number(dtype), device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The tensor itself where it is contiguous already
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The tensor itself where its ids are int64 already
inline Tensor as_long(const Tensor& ids) {
  return ids.scalar_type() == ScalarType::Long ? ids : torch::stable::to(ids, ScalarType::Long);
}

}  // namespace dmax
