// Products of bfloat16 matrices with float32 sums: on the tile registers of AMX, or with the dot
// products of AVX512-BF16.
//
// PyTorch's own bfloat16 product rounds its result to bfloat16, and a float32 product of widened
// matrices runs at half the rate of the dot products, an eighth of AMX's or less. So we have
// products of our own.
#pragma once

#include <cstdint>

#include "common/element_types.h"

namespace dmax::cpu {

// The most tokens per call: at D = 2,048 their packed weights take 256 KiB of L2
constexpr int64_t kProductTokens = 64;

// A matrix with any strides, in elements
template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;

  const T* row(int64_t i) const { return data + i * row_stride; }
  MatrixView from_row(int64_t i) const { return {row(i), row_stride, column_stride}; }
};

struct BFloat16Products {
  // The fewest rows of which the product is faster than row_products() (tile_kernels.h)
  int64_t least_rows;
  // Sizes of `rows` packed rows and of the scratch memory of one multiply()
  int64_t (*packed_bytes)(int64_t rows, int64_t dim);
  int64_t (*scratch_bytes)(int64_t dim, int64_t rows);
  // Packs rows [0, rows) of width dim into the layout that multiply() reads; 64-byte aligned
  void (*pack_rows)(MatrixView<BFloat16> hidden, int64_t rows, int64_t dim, void* packed);
  // logits[row * logits_stride + token] for all rows and `tokens` <= kProductTokens rows of weight
  void (*multiply)(MatrixView<BFloat16> weight, int64_t tokens, int64_t dim, const void* packed,
                   int64_t rows, void* scratch, float* logits, int64_t logits_stride);
};

// Null if the CPU has neither AMX nor AVX512-BF16
const BFloat16Products* bfloat16_products();

}  // namespace dmax::cpu
