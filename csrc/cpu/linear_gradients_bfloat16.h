// Gradients of linear_oput_loss on CPUs that multiply bfloat16 directly (AMX or AVX512-BF16), in
// the same steps as in linear_gradients.h.
//
// The gradient of a logit is rounded to bfloat16 before the two products that use it, as the GPU
// implementations and eager PyTorch do. This adds at most 2^-8 of the sum of its products'
// magnitudes to a gradient's error, whatever the number of blocks. All sums are float32, and each
// gradient is rounded once.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/fresh_pages.h"
#include "cpu/linear_gradients.h"

namespace dmax::cpu {

class BFloat16Gradients {
 public:
  // Tokens per block. Each block runs two parallel regions, and its gradients take 8 KiB per row.
  static constexpr int64_t kTokens = 2048;

  static bool takes_sweeps(ScalarType) { return false; }

  BFloat16Gradients(const StackedRows& stacked, const Tensor& weight,
                    const LinearLossGradients& grads)
      : rows_(stacked.size()),
        vocab_(weight.size(0)),
        dim_(weight.size(1)),
        weight_(matrix_view<BFloat16>(weight)),
        grads_(grads),
        hidden_(empty_like_device(weight, {rows_, dim_}, ScalarType::BFloat16)),
        grad_logits_(
            empty_like_device(weight, {rows_, std::min(vocab_, kTokens)}, ScalarType::BFloat16)) {
    gather_rows(stacked, 0, rows_, hidden_);
    const MatrixView<BFloat16> view = matrix_view<BFloat16>(hidden_);
    for (int64_t row = 0; row < rows_; row += kPart) {
      const int64_t m = std::min(kPart, rows_ - row);
      packed_hidden_.emplace_back(products_.packed_bytes(m, dim_));
      products_.pack_rows(view.from_row(row), m, dim_, packed_hidden_.back().data);
    }
    if (grads.needs_weight()) {
      hidden_columns_ = as_contiguous(torch::stable::transpose(hidden_, 0, 1));
    }
    if (grads.needs_hidden()) {
      grad_columns_ = torch::stable::new_zeros(weight, {dim_, rows_}, ScalarType::Float);
    }
  }

  // tokens() turns a chunk of them into gradients before it writes the weight's
  KeptLogits kept_logits(int64_t rows) const {
    const int64_t outside = std::min(rows, KeptLogits::most_rows(vocab_, dim_));
    if (grads_.needs_weight()) {
      const int64_t inside = std::min(rows, KeptLogits::most_rows_inside(grads_.weight));
      if (inside >= outside) return KeptLogits::inside(grads_.weight, inside, kPart);
    }
    return {hidden_, outside, vocab_, kPart};
  }

  template <class RowGradient>
  void block(const Sweep& all_rows, int64_t first, int64_t n, const RowGradient& row_gradient) {
    parallel_for(num_parts(n), 1, [&](int64_t begin, int64_t end) {
      TokenBuffers buffers(*this);
      for (int64_t t = begin * kPart; t < std::min(n, end * kPart); t += kPart) {
        tokens(row_gradient, all_rows, first, t, std::min(kPart, n - t), buffers);
      }
    });
    if (grads_.needs_hidden()) add_to_hidden(first, n);
  }

  void finish() {
    if (!grads_.needs_hidden()) return;
    torch::stable::copy_(grads_.hidden, torch::stable::transpose(grad_columns_, 0, 1));
  }

 private:
  // The most rows, tokens or columns that a thread multiplies at once: at D = 2,048 a packed
  // operand takes 1 MiB of a 2 MiB L2
  static constexpr int64_t kPart = 256;

  struct TokenBuffers {
    explicit TokenBuffers(const BFloat16Gradients& op)
        : scratch(op.products_.scratch_bytes(std::max(op.dim_, op.rows_), kPart)),
          packed(op.grads_.needs_weight() ? op.products_.packed_bytes(kPart, op.rows_) : 0),
          values(kPart * kPart) {}
    AlignedBuffer scratch;
    AlignedBuffer packed;
    std::vector<float> values;
  };

  static int64_t num_parts(int64_t n) { return (n + kPart - 1) / kPart; }

  BFloat16* grad_logits() const { return static_cast<BFloat16*>(grad_logits_.mutable_data_ptr()); }

  // values[j * kPart + t] = packed row j . matrix row t, for j < count and t < n <= kPart
  void multiply(MatrixView<BFloat16> matrix, int64_t n, int64_t depth, const AlignedBuffer& packed,
                int64_t count, AlignedBuffer& scratch, float* values) const {
    for (int64_t t = 0; t < n; t += kProductTokens) {
      products_.multiply({matrix.row(t), matrix.row_stride, matrix.column_stride},
                         std::min(kProductTokens, n - t), depth, packed.data, count, scratch.data,
                         values + t, kPart);
    }
  }

  // Computes the gradients of the logits of n of the block's tokens, from its t-th on, and from
  // them the weight's
  template <class RowGradient>
  void tokens(const RowGradient& row_gradient, const Sweep& all_rows, int64_t first, int64_t t,
              int64_t n, TokenBuffers& buffers) const {
    const int64_t stride = grad_logits_.size(1);
    float* values = buffers.values.data();
    double sums[kPart] = {};
    const MatrixView<BFloat16> weight{weight_.row(first + t), weight_.row_stride,
                                      weight_.column_stride};
    for (int64_t row = 0; row < rows_; row += kPart) {
      const int64_t m = std::min(kPart, rows_ - row);
      const int64_t kept = std::clamp<int64_t>(all_rows.kept.rows() - row, 0, m);
      if (kept < m) {
        multiply(weight, n, dim_, packed_hidden_[row / kPart], m, buffers.scratch, values);
      }
      float part_sums[kPart] = {};
      for (int64_t i = 0; i < m; ++i) {
        float* x = i < kept ? all_rows.kept.at(row + i, first + t) : values + i * kPart;
        row_gradient(row + i, x, first + t, n, i < kept);
        if (grads_.needs_bias()) tile_kernels<float>().add_scaled(part_sums, x, 1.0f, n);
        narrow_.store_scaled(grad_logits() + (row + i) * stride + t, x, 1.0f, n);
      }
      for (int64_t j = 0; j < n; ++j) sums[j] += part_sums[j];
    }
    if (grads_.needs_bias()) {
      std::copy_n(sums, n, values);
      narrow_.store_scaled(static_cast<BFloat16*>(grads_.bias.mutable_data_ptr()) + first + t,
                           values, 1.0f, n);
    }
    if (!grads_.needs_weight()) return;
    products_.pack_rows({grad_logits() + t, 1, stride}, n, rows_, buffers.packed.data);
    const MatrixView<BFloat16> columns = matrix_view<BFloat16>(hidden_columns_);
    BFloat16* out = static_cast<BFloat16*>(grads_.weight.mutable_data_ptr());
    make_pages(out + (first + t) * dim_, n * dim_ * sizeof(BFloat16));
    for (int64_t d = 0; d < dim_; d += kPart) {
      const int64_t width = std::min(kPart, dim_ - d);
      multiply({columns.row(d), columns.row_stride, 1}, width, rows_, buffers.packed, n,
               buffers.scratch, values);
      for (int64_t j = 0; j < n; ++j) {
        narrow_.store_scaled(out + (first + t + j) * dim_ + d, values + j * kPart, 1.0f, width);
      }
    }
  }

  // Adds the block's part of the hidden states' gradients, which are stored transposed
  void add_to_hidden(int64_t first, int64_t n) {
    // A width that leaves no thread idle; it does not change the result
    const int64_t width = std::min(kPart, (dim_ / num_threads() + 31) / 32 * 32 + 32);
    const int64_t stride = grad_logits_.size(1);
    float* sums = grad_columns_.mutable_data_ptr<float>();
    parallel_for((dim_ + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
      AlignedBuffer scratch(products_.scratch_bytes(n, width));
      AlignedBuffer packed(products_.packed_bytes(width, n));
      std::vector<float> values(width * kPart);
      for (int64_t d = begin * width; d < std::min(dim_, end * width); d += width) {
        const int64_t count = std::min(width, dim_ - d);
        const BFloat16* weight = weight_.row(first) + d * weight_.column_stride;
        products_.pack_rows({weight, weight_.column_stride, weight_.row_stride}, count, n,
                            packed.data);
        for (int64_t row = 0; row < rows_; row += kPart) {
          const int64_t m = std::min(kPart, rows_ - row);
          multiply({grad_logits() + row * stride, stride, 1}, m, n, packed, count, scratch,
                   values.data());
          for (int64_t j = 0; j < count; ++j) {
            tile_kernels<float>().add_scaled(sums + (d + j) * rows_ + row,
                                             values.data() + j * kPart, 1.0f, m);
          }
        }
      }
    });
  }

  const BFloat16Products& products_ = *bfloat16_products();
  const TileKernels<BFloat16>& narrow_ = tile_kernels<BFloat16>();
  int64_t rows_, vocab_, dim_;
  MatrixView<BFloat16> weight_;
  LinearLossGradients grads_;
  Tensor hidden_;          // [rows, D]
  Tensor hidden_columns_;  // [D, rows]
  Tensor grad_logits_;     // [rows, tokens of a block]
  Tensor grad_columns_;    // [D, rows] float32
  std::vector<AlignedBuffer> packed_hidden_;
};

}  // namespace dmax::cpu
