// Logits of a few tokens: hidden x weight^T with float32 products and sums, for the LM head's ops.
//
// A vector holds one logit of each of sixteen rows. So a row's sums never meet another row's, and
// are added in one order whatever the number of rows; and the weight, the one large operand, is
// read once for all of them, in the layout and dtype it has in memory.
#pragma once

#include <cstdint>

#include "common/element_types.h"

namespace dmax::cpu {

// Tokens per call at most: at D = 2,048 their float32 weights fill a quarter of a 2 MiB L2
constexpr int64_t kProductTokens = 64;

// A matrix of any strides, in elements
template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;

  const T* row(int64_t i) const { return data + i * row_stride; }
};

template <class T>
struct ProductKernels {
  // Of `rows` packed rows, and of the scratch memory of one multiply()
  int64_t (*packed_bytes)(int64_t rows, int64_t dim);
  int64_t (*scratch_bytes)(int64_t dim, int64_t rows);
  // Rows [0, rows) of width dim in the layout that multiply() reads; 64-byte aligned
  void (*pack_rows)(MatrixView<T> hidden, int64_t rows, int64_t dim, void* packed);
  // logits[row * logits_stride + token] for all rows and `tokens` <= kProductTokens rows of weight
  void (*multiply)(MatrixView<T> weight, int64_t tokens, int64_t dim, const void* packed,
                   int64_t rows, void* scratch, float* logits, int64_t logits_stride);
  // Multiplies T as it is stored, at several times the speed of float32; else widened to float32
  bool narrow_products;
};

template <class T>
const ProductKernels<T>& product_kernels();

}  // namespace dmax::cpu
