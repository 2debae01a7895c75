// The visible logits of one row: those that are neither suppressed nor excluded by the mask.
//
// The row is read tile by tile (kTile). A tile whose tokens are all visible is read where it is,
// one without any is not read, and of any other a float32 copy is made, with -inf at the rest.
#pragma once

#include <limits>

#include "common/draw_options.h"
#include "common/torch_stable.h"
#include "cpu/simd/draw_kernels.h"
#include "cpu/simd/tile_kernels.h"

namespace dmax::cpu {

// The mask `allowed` of an op: bit v % 32 of word v / 32, in words of a row each or of one for all
class AllowedMask {
 public:
  AllowedMask(const OptionalTensor& allowed, int64_t vocab) {
    if (!allowed) return;
    tensor_ = as_contiguous(*allowed);
    words_ = reinterpret_cast<const uint32_t*>(tensor_->const_data_ptr<int32_t>());
    stride_ = tensor_->numel() == mask_words(vocab) ? 0 : mask_words(vocab);
  }

  // nullptr: every token is allowed
  const uint32_t* row(int64_t row) const { return words_ ? words_ + row * stride_ : nullptr; }

 private:
  OptionalTensor tensor_;  // keeps the memory
  const uint32_t* words_ = nullptr;
  int64_t stride_ = 0;
};

enum class Visibility { kAll, kSome, kNone };

// Of the tokens begin .. begin + n, where begin is a multiple of 32
inline Visibility visibility(const uint32_t* words, int64_t begin, int64_t n) {
  if (!words) return Visibility::kAll;
  uint32_t every = ~0u, any = 0;
  const uint32_t* word = words + begin / 32;
  for (int64_t i = 0; i < n / 32; ++i) {
    every &= word[i];
    any |= word[i];
  }
  if (n % 32 != 0) {
    const uint32_t used = (1u << n % 32) - 1;
    every &= word[n / 32] | ~used;
    any |= word[n / 32] & used;
  }
  return every == ~0u ? Visibility::kAll : any == 0 ? Visibility::kNone : Visibility::kSome;
}

template <class T>
struct VisibleRow {
  const T* x;
  int64_t vocab;
  int64_t suppress;       // -1: none
  const uint32_t* words;  // nullptr: every token is allowed

  int64_t num_tiles() const { return (vocab + kTile - 1) / kTile; }

  // Calls f(y, n) with the n logits from token `begin`, a multiple of 32, on: y is x + begin or
  // `buffer`. Returns false without a call if none of them is visible.
  template <class F>
  bool visit(int64_t begin, int64_t n, float* buffer, const F& f) const {
    const Visibility visible = visibility(words, begin, n);
    if (visible == Visibility::kNone) return false;
    const bool suppresses = suppress >= begin && suppress < begin + n;
    if (visible == Visibility::kAll && !suppresses) {
      f(x + begin, n);
      return true;
    }
    copy(begin, n, visible, buffer);
    f(static_cast<const float*>(buffer), n);
    return true;
  }

  // The same logits in float32, in `buffer`, with -inf for those that are not visible
  void load(int64_t begin, int64_t n, float* buffer) const {
    copy(begin, n, visibility(words, begin, n), buffer);
  }

 private:
  void copy(int64_t begin, int64_t n, Visibility visible, float* buffer) const {
    if (visible == Visibility::kAll) {
      tile_kernels<T>().widen(buffer, x + begin, n);
    } else {
      draw_kernels<T>().widen_allowed(buffer, x + begin, n, words + begin / 32);
    }
    if (suppress >= begin && suppress < begin + n) {
      buffer[suppress - begin] = -std::numeric_limits<float>::infinity();
    }
  }
};

}  // namespace dmax::cpu
