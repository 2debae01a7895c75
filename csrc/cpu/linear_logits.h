// Logits of a block of rows and of a few tokens at a time, hidden x weight^T, in float32.
//
// Inputs of 16 bits are multiplied exactly and summed in float32: PyTorch's own 16-bit product
// would round the logits. Which product is used:
//
//   rows        float32, float16           bfloat16 with AVX512-BF16   bfloat16 with AMX
//   1 to 8      row_products               dot_products.cpp            row_products
//   from 9 on   PyTorch's float32 product  dot_products.cpp            amx_products.cpp
//
// Without those two, bfloat16 is as float16. With few rows, the time goes into reading the weight,
// which the dot products of row_products read once and as it is stored. PyTorch's product packs its
// operands first, and reads 16-bit weights from a widened copy of kLinearTokens tokens.
//
// Compared with PyTorch's product of all tokens followed by our top1_confidence, one thread of a
// Zen 4 (AVX-512) takes this share of the time:
//
//   rows                              1     2     4     8     12    16    32    64    256
//   float32, D = 1,024                0.2 to 0.42             -     0.63  0.67  -     0.91
//   bfloat16 in bfloat16, D = 2,048   0.60  0.83  0.89  0.89  0.93  0.98  0.81  0.91  0.93
//
// That bfloat16 product rounds its logits. Widened to float32, bfloat16 took 2.5 times as long as
// it for 32 rows, and twice as long for 256. In float32, the dot products and PyTorch's product
// took the same time at 16 rows. AMX was 1.6 times as fast as eager bfloat16 for 32 rows on a
// Sapphire Rapids (bench/results/cpu-sapphire-rapids.json).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/simd/bfloat16_products.h"
#include "cpu/simd/tile_kernels.h"

namespace dmax::cpu {

// Rows that share one reading of the weight. At D = 2,048 they take 2 MiB in float32.
constexpr int64_t kLinearRows = 256;
// Tokens multiplied and reduced at once: 512 KiB of logits for those rows. With 256, a draw from
// 256 rows took 8 % longer; with 1,024, their maxima took 3 % longer.
constexpr int64_t kLinearTokens = 512;
// Rows up to which our dot products are faster
constexpr int64_t kFewRows = 8;

template <class T>
MatrixView<T> matrix_view(const Tensor& matrix) {
  return {static_cast<const T*>(matrix.const_data_ptr()), matrix.strides()[0], matrix.strides()[1]};
}

// The same memory as a tensor that does not own it. Unlike narrow(), this bypasses the dispatcher,
// whose state (autograd, autocast) the worker threads do not share.
inline Tensor borrowed_matrix(const float* data, int64_t rows, int64_t columns, int64_t row_stride,
                              int64_t column_stride) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {row_stride, column_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<float*>(data), 2, sizes, strides, 0, aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// out = a b + (accumulate ? out : 0) in float32, bypassing the dispatcher and therefore autocast
inline void multiply_into(const Tensor& a, const Tensor& b, bool accumulate, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(),
                                                         accumulate ? 1.0 : 0.0, 1.0));
}

// y[i * columns + k] = x[i, k], whatever the strides of x
template <class T>
void widen_rows(MatrixView<T> x, int64_t rows, int64_t columns, float* y) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  for (int64_t i = 0; i < rows; ++i, y += columns) {
    if (x.column_stride == 1) {
      kernels.widen(y, x.row(i), columns);
    } else {
      for (int64_t k = 0; k < columns; ++k) y[k] = kernels.value(x.row(i) + k * x.column_stride);
    }
  }
}

// x in float32 with any strides: x itself if it is float32, otherwise a copy in `buffer`
template <class T>
MatrixView<float> widened(MatrixView<T> x, int64_t rows, int64_t columns, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if (x.row_stride == 1 && x.column_stride != 1) {  // a transposed matrix stays one
    widen_rows(MatrixView<T>{x.data, x.column_stride, 1}, columns, rows, buffer);
    return {buffer, 1, rows};
  } else {
    widen_rows(x, rows, columns, buffer);
    return {buffer, columns, 1};
  }
}

// Memory for a product's operands, aligned to a cache line
struct AlignedBuffer {
  explicit AlignedBuffer(int64_t bytes) : storage(bytes / sizeof(float) + kLine) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    data = storage.data() + (kLine - address / sizeof(float) % kLine) % kLine;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer(AlignedBuffer&&) = default;  // the memory stays where it is

  static constexpr int64_t kLine = 64 / sizeof(float);
  std::vector<float> storage;
  float* data;
};

// The rows of one block, ready to be multiplied by any thread
template <class T>
class LinearLogits {
 public:
  // For blocks of at most `most_rows` rows
  LinearLogits(MatrixView<T> hidden, MatrixView<T> weight, int64_t dim, int64_t most_rows)
      : hidden_(hidden),
        weight_(weight),
        dim_(dim),
        bfloat16_(std::is_same_v<T, BFloat16> ? bfloat16_products() : nullptr),
        rows_(std::max<int64_t>(most_rows * dim * sizeof(float),
                                bfloat16_ ? bfloat16_->packed_bytes(most_rows, dim) : 0)) {}

  void load_rows(int64_t first, int64_t count) {
    count_ = count;
    way_ = choose_way();
    const MatrixView<T> block = hidden_.from_row(first);
    if (way_ == Way::kBFloat16) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        bfloat16_->pack_rows(block, count, dim_, rows_.data);
      }
      return;
    }
    widen_rows(block, count, dim_, rows_.data);
  }

  // Memory that one thread needs for compute()
  AlignedBuffer scratch() const {
    if (way_ == Way::kBFloat16) return AlignedBuffer(bfloat16_->scratch_bytes(dim_, count_));
    const bool widens = way_ == Way::kLibrary && !std::is_same_v<T, float>;
    return AlignedBuffer(widens ? kLinearTokens * dim_ * sizeof(float) : 0);
  }

  // logits[i * kLinearTokens + j] belongs to row i and token first + j; n <= kLinearTokens
  void compute(int64_t first, int64_t n, AlignedBuffer& scratch, float* logits) const {
    const MatrixView<T> tokens = weight_.from_row(first);
    switch (way_) {
      case Way::kDotProducts:
        return tile_kernels<T>().row_products(tokens.data, tokens.row_stride, n, rows_.data, count_,
                                              dim_, logits, kLinearTokens);
      case Way::kBFloat16:
        if constexpr (std::is_same_v<T, BFloat16>) {
          for (int64_t t = 0; t < n; t += kProductTokens) {
            bfloat16_->multiply(tokens.from_row(t), std::min(kProductTokens, n - t), dim_,
                                rows_.data, count_, scratch.data, logits + t, kLinearTokens);
          }
        }
        return;
      case Way::kLibrary: {
        const MatrixView<float> wide = widened(tokens, n, dim_, scratch.data);
        multiply_into(borrowed_matrix(rows_.data, count_, dim_, dim_, 1),
                      borrowed_matrix(wide.data, dim_, n, wide.column_stride, wide.row_stride),
                      false, borrowed_matrix(logits, count_, n, kLinearTokens, 1));
      }
    }
  }

 private:
  enum class Way { kDotProducts, kLibrary, kBFloat16 };

  Way choose_way() const {
    const int64_t few = bfloat16_ ? bfloat16_->least_rows - 1 : kFewRows;
    if (count_ <= few && weight_.column_stride == 1) return Way::kDotProducts;
    return bfloat16_ ? Way::kBFloat16 : Way::kLibrary;
  }

  MatrixView<T> hidden_;
  MatrixView<T> weight_;
  int64_t dim_;
  const BFloat16Products* bfloat16_;
  AlignedBuffer rows_;  // the block's rows: float32, or packed by bfloat16_
  int64_t count_ = 0;
  Way way_ = Way::kLibrary;
};

}  // namespace dmax::cpu
