// [..., width] as rows at one stride, without a copy if the strides allow it.
#pragma once

#include "common/tensor_checks.h"

namespace dmax {

// Strides are in elements everywhere in csrc/.
struct RowView {
  Tensor tensor;  // keeps the memory alive, including that of a copy
  int64_t rows;
  int64_t width;
  int64_t row_stride;
};

// True if the elements of a row are adjacent and the rows lie at one common stride
inline bool rows_collapse(const Tensor& t, int64_t* rows, int64_t* row_stride) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t last = t.dim() - 1;
  *rows = 1;
  *row_stride = sizes[last];
  if (sizes[last] > 1 && strides[last] != 1) return false;
  bool first = true;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (first) {
      *row_stride = strides[i];
      first = false;
    } else if (strides[i] != *row_stride * *rows) {
      return false;
    }
    *rows *= sizes[i];
  }
  return true;
}

inline RowView row_view(const Tensor& t) {
  int64_t rows;
  int64_t row_stride;
  const int64_t width = t.size(t.dim() - 1);
  if (t.numel() > 0 && rows_collapse(t, &rows, &row_stride)) {
    return RowView{t, rows, width, row_stride};
  }
  Tensor copy = as_contiguous(t);
  return RowView{copy, width == 0 ? 0 : copy.numel() / width, width, width};
}

// For tensors that are written in place: a copy would lose the result, so needing one is an error
inline RowView mutable_row_view(const char* op, const char* name, const Tensor& t) {
  RowView view = row_view(t);
  const bool overlaps = view.rows > 1 && view.row_stride < view.width;
  DMAX_CHECK(view.tensor.const_data_ptr() == t.const_data_ptr() && !overlaps, op, ": ", name,
             " is written in place: its last dimension must be adjacent in memory and its rows at "
             "one stride without overlap, got strides ",
             shape_text(t.strides()), " for shape ", shape_text(t.sizes()));
  return view;
}

}  // namespace dmax
