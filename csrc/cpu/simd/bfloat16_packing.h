// Operands of bfloat16 products, packed in pairs of columns; for files compiled once per
// instruction set.
//
// A step is 32 columns. Sixteen rows of a step take 1 KiB, here called a tile, in one of two forms:
// rows packed in pairs, [column / 2][row][column % 2], or tokens as they lie in memory,
// [token][column].
#pragma once

#include "cpu/simd/bfloat16_products.h"
#include "cpu/simd/simd.h"

namespace dmax::cpu::DMAX_ISA {

namespace {

constexpr int64_t kStep = 32;                      // columns
constexpr int64_t kTileElements = kLanes * kStep;  // 16-bit elements of one tile: 1 KiB
constexpr int64_t kTileBytes = kTileElements * 2;
constexpr int64_t kPairRows = 2 * kLanes;  // a pair of panels of sixteen rows

inline int64_t num_steps(int64_t dim) { return (dim + kStep - 1) / kStep; }
inline int64_t num_pairs(int64_t rows) { return (rows + kPairRows - 1) / kPairRows; }

inline int64_t packed_bytes(int64_t rows, int64_t dim) {
  return num_pairs(rows) * 2 * num_steps(dim) * kTileBytes;
}

// pack_rows() for a matrix whose columns are contiguous: two columns become one line of pairs
inline void pack_columns(MatrixView<BFloat16> hidden, int64_t rows, int64_t dim, BFloat16* out) {
  const auto bits = [](const BFloat16* x) { return reinterpret_cast<const uint16_t*>(x); };
  constexpr int64_t kAhead = 16;  // columns
  for (int64_t k = 0; k < dim; k += 2) {
    const uint16_t* even = bits(hidden.data + k * hidden.column_stride);
    const uint16_t* odd = even + hidden.column_stride;
    for (int64_t row = 0; row < rows; row += kLanes) {
      const int64_t tile = (row / kPairRows * num_steps(dim) + k / kStep) * 2 + row / kLanes % 2;
      uint16_t* line =
          reinterpret_cast<uint16_t*>(out + tile * kTileElements + k % kStep / 2 * kStep);
      const int64_t count = rows - row < kLanes ? rows - row : kLanes;
      if (count == kLanes && k + 1 < dim) {
        uint32_t pairs[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          pairs[lane] = even[row + lane] | static_cast<uint32_t>(odd[row + lane]) << 16;
        }
        __builtin_memcpy(line, pairs, sizeof(pairs));
        // Columns lie too far apart for the hardware to see the pattern
        __builtin_prefetch(even + kAhead * hidden.column_stride + row);
        __builtin_prefetch(odd + kAhead * hidden.column_stride + row);
        continue;
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        line[2 * lane] = even[row + lane];
        if (k + 1 < dim) line[2 * lane + 1] = odd[row + lane];
      }
    }
  }
}

// packed[pair of panels][step][panel][column / 2][row][column % 2]
inline void pack_rows(MatrixView<BFloat16> hidden, int64_t rows, int64_t dim, void* packed) {
  BFloat16* out = static_cast<BFloat16*>(packed);
  if (rows % kPairRows != 0 || dim % kStep != 0) {
    __builtin_memset(packed, 0, packed_bytes(rows, dim));
  }
  if (hidden.row_stride == 1) return pack_columns(hidden, rows, dim, out);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t pair = row / kPairRows, panel = row / kLanes % 2, lane = row % kLanes;
    const BFloat16* x = hidden.row(row);
    for (int64_t k = 0; k < dim; ++k) {
      const int64_t tile = (pair * num_steps(dim) + k / kStep) * 2 + panel;
      out[tile * kTileElements + k % kStep / 2 * kStep + lane * 2 + k % 2] =
          x[k * hidden.column_stride];
    }
  }
}

// The columns of one token in one step; where `count` < kStep, zeros follow
DMAX_INLINE void pack_line(const BFloat16* x, int64_t column_stride, int64_t count,
                           BFloat16* line) {
  if (column_stride == 1 && count >= kStep) {
    __builtin_memcpy(line, x, kStep * 2);
    return;
  }
  for (int64_t k = 0; k < kStep; ++k) line[k] = k < count ? x[k * column_stride] : BFloat16{0};
}

}  // namespace

}  // namespace dmax::cpu::DMAX_ISA
