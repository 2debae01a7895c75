// Memory for results as large as logits or as the head's gradient.
//
// malloc takes blocks of 32 MiB or more from the kernel and gives them back every time. Their pages
// are then mapped as they are first written, 4 KiB at a time: for a float32 gradient of 157,184 x
// 2,048, 314,368 times, which can take as long as the products. Asked to, Linux maps 2 MiB at a
// time. NumPy asks for the same.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "common/torch_stable.h"

namespace dmax::cpu {

// As empty_like_device(); all of it should be written, since a huge page is there as a whole
inline Tensor empty_large(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Tensor t = empty_like_device(like, sizes, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeastBytes = 32 << 20;
  constexpr uintptr_t kPage = 4096;
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (bytes >= kLeastBytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first_page = (begin + kPage - 1) / kPage * kPage;
    // Where the kernel refuses, the pages stay small
    madvise(reinterpret_cast<void*>(first_page), begin + bytes - first_page, MADV_HUGEPAGE);
  }
#endif
  return t;
}

}  // namespace dmax::cpu
