// Whether a tensor that is written in place shares memory with another argument.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/row_view.h"

namespace dmax {

struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // null if an optional one was not given
};

// The addresses from the first byte of a tensor to one past its last byte
struct ByteRange {
  int64_t begin;
  int64_t end;

  bool meets(const ByteRange& other) const { return begin < other.end && other.begin < end; }
};

inline ByteRange byte_range(const Tensor& t) {
  if (t.numel() == 0) return {0, 0};
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  const int64_t begin = static_cast<int64_t>(reinterpret_cast<intptr_t>(t.const_data_ptr()));
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {begin, begin + (last + 1) * bytes};
}

// Whether any element of the slice of t over dimensions `dim` and up, which begins at address `at`,
// has a byte in `range`. Only slices that reach into the range are looked at.
inline bool any_element_in(const ByteRange& range, const Tensor& t, int64_t dim, int64_t at) {
  if (dim == t.dim()) return true;
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  int64_t slice = bytes;
  for (int64_t i = dim + 1; i < t.dim(); ++i) slice += (t.size(i) - 1) * t.stride(i) * bytes;
  const int64_t stride = t.stride(dim) * bytes;
  int64_t first = 0;
  int64_t last = 0;
  if (stride > 0) {
    first = std::max<int64_t>(0, range.begin - at - slice + stride) / stride;
    last = std::min(t.size(dim) - 1, (range.end - 1 - at) / stride);
  }
  for (int64_t i = first; i <= last; ++i) {
    const int64_t begin = at + i * stride;
    if (!range.meets({begin, begin + slice})) continue;
    if (any_element_in(range, t, dim + 1, begin)) return true;
  }
  return false;
}

// `written` has rows of adjacent elements at one stride. Rows of two tensors may alternate in
// memory, as in stacked[:, 0] and stacked[:, 1], so overlapping ranges need a closer look.
inline bool shares_memory(const Tensor& written, const ByteRange& range, const Tensor& other,
                          const ByteRange& other_range) {
  if (!range.meets(other_range)) return false;
  const int64_t bytes = static_cast<int64_t>(written.element_size());
  int64_t rows = 1;
  int64_t row_stride = 0;
  int64_t width = 1;
  if (written.dim() > 0) {
    rows_collapse(written, &rows, &row_stride);
    width = written.size(written.dim() - 1);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = range.begin + row * row_stride * bytes;
    const ByteRange row_range{begin, begin + width * bytes};
    if (row_range.meets(other_range) && any_element_in(row_range, other, 0, other_range.begin)) {
      return true;
    }
  }
  return false;
}

// The result of an op whose arguments overlap would depend on the order in which it reads and
// writes. PyTorch's own in-place ops refuse such arguments too.
inline void check_no_overlap(const char* op, std::initializer_list<NamedTensor> written,
                             std::initializer_list<NamedTensor> read) {
  struct Argument {
    NamedTensor named;
    ByteRange range;
    bool written;
  };
  std::vector<Argument> arguments;
  arguments.reserve(written.size() + read.size());
  for (const auto* part : {&written, &read}) {
    for (const NamedTensor& named : *part) {
      if (named.tensor) {
        arguments.push_back({named, byte_range(*named.tensor), part == &written});
      }
    }
  }
  for (size_t i = 0; i < arguments.size() && arguments[i].written; ++i) {
    const Argument& target = arguments[i];
    for (size_t j = i + 1; j < arguments.size(); ++j) {
      const Argument& other = arguments[j];
      DMAX_CHECK(
          !shares_memory(*target.named.tensor, target.range, *other.named.tensor, other.range), op,
          ": ", target.named.name,
          " is written in place and must not share memory with another argument, got overlap with ",
          other.named.name);
    }
  }
}

}  // namespace dmax
