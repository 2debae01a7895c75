// Gradients of linear_oput_loss by PyTorch's float32 product, one vocabulary block at a time.
//
// For each block, the logits are computed again, unless they were kept, and overwritten with their
// gradients, from which the products for the hidden states, the weight and the bias follow. 16-bit
// gradients are made in one sweep over all rows: the block's part of the weight's gradient is
// finished and rounded before the next block begins. A float32 gradient adds up over sweeps.
// linear_gradients_bfloat16.h does the same in bfloat16.
#pragma once

#include "cpu/fresh_pages.h"
#include "cpu/kept_logits.h"
#include "cpu/linear_logits.h"
#include "cpu/stacked_passes.h"

namespace dmax::cpu {

// The gradients to compute; one that is not needed is an empty tensor
struct LinearLossGradients {
  Tensor hidden;  // for the stacked rows, in float32
  Tensor weight;
  Tensor bias;

  bool needs_hidden() const { return hidden.numel() > 0; }
  bool needs_weight() const { return weight.numel() > 0; }
  bool needs_bias() const { return bias.numel() > 0; }
};

class LibraryGradients {
 public:
  // Large enough that a block's products outweigh the waits between them, and small enough that its
  // logits (2 MiB) fit in a cache
  static constexpr int64_t kTokens = 1024;
  static constexpr int64_t kRows = 512;

  static bool takes_sweeps(ScalarType dtype) { return dtype == ScalarType::Float; }

  LibraryGradients(const StackedRows& stacked, const Tensor& weight,
                   const LinearLossGradients& grads)
      : weight_(weight),
        grads_(grads),
        tokens_(std::min(weight.size(0), kTokens)),
        narrow_(weight.scalar_type() != ScalarType::Float),
        hidden_(widened_rows(stacked, weight)),
        logits_(matrix(std::min(stacked.size(), kRows), tokens_)),
        wide_weight_(matrix(narrow_ ? tokens_ : 0, weight.size(1))),
        wide_grad_(matrix(narrow_ && grads.needs_weight() ? tokens_ : 0, weight.size(1))) {}

  KeptLogits kept_logits(int64_t rows) const {
    const int64_t vocab = weight_.size(0);
    return {weight_, std::min(rows, KeptLogits::most_rows(vocab, weight_.size(1))), vocab, kTokens};
  }

  // row_gradient(i, x, first, n, kept) overwrites x, the n logits of stacked row i from token
  // `first` on, with their gradients; kept logits have their bias already
  template <class RowGradient>
  void block(const Sweep& sweep, int64_t first, int64_t n, const RowGradient& row_gradient) {
    const Tensor weight = widened_weight(first, n);
    if (grads_.needs_weight() && sweep.first_row == 0) make_weight_pages(first, n);
    const Tensor grad_weight = narrow_ ? top(wide_grad_, n) : top(grads_.weight, n, first);
    std::vector<double> bias_sums = earlier_bias_sums(sweep, first, n);
    for (int64_t row = sweep.first_row; row < sweep.end();) {
      const int64_t m = sweep.part(row, kRows);
      const bool kept = sweep.keeps(row);
      const Tensor hidden = top(hidden_, m, row);
      float* logits =
          kept ? sweep.kept.at(row - sweep.first_row, first) : logits_.mutable_data_ptr<float>();
      const Tensor x = borrowed_matrix(logits, m, n, n, 1);
      if (!kept) multiply_into(hidden, transposed(weight), false, x);
      logits_to_gradients(row, m, first, n, logits, kept, row_gradient);
      if (grads_.needs_hidden()) {
        multiply_into(x, weight, first > 0, top(grads_.hidden, m, row));
      }
      if (grads_.needs_weight()) multiply_into(transposed(x), hidden, row > 0, grad_weight);
      if (grads_.needs_bias()) add_column_sums(logits, m, n, bias_sums.data());
      row += m;
    }
    if (narrow_ && grads_.needs_weight()) {
      Tensor out = top(grads_.weight, n, first);
      torch::stable::copy_(out, grad_weight);
    }
    if (grads_.needs_bias()) store_bias(bias_sums, first);
  }

  void finish() {}

 private:
  Tensor matrix(int64_t rows, int64_t columns) const {
    return empty_like_device(weight_, {rows, columns}, ScalarType::Float);
  }

  // Rows [from, from + count), or no rows if the tensor is empty
  static Tensor top(Tensor rows, int64_t count, int64_t from = 0) {
    return rows.numel() == 0 ? rows : torch::stable::narrow(rows, 0, from, count);
  }

  Tensor widened_weight(int64_t first, int64_t n) const {
    const Tensor rows = top(weight_, n, first);
    if (!narrow_) return rows;
    Tensor wide = top(wide_weight_, n);
    torch::stable::copy_(wide, rows);
    return wide;
  }

  template <class RowGradient>
  void logits_to_gradients(int64_t row, int64_t m, int64_t first, int64_t n, float* x, bool kept,
                           const RowGradient& row_gradient) {
    constexpr int64_t kGrain = 16384;  // logits per thread
    parallel_for(m, kGrain / n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) row_gradient(row + i, x + i * n, first, n, kept);
    });
  }

  // The products' threads would take the block's page faults
  void make_weight_pages(int64_t first, int64_t n) const {
    const int64_t row_bytes = grads_.weight.stride(0) * grads_.weight.element_size();
    char* rows = static_cast<char*>(grads_.weight.mutable_data_ptr()) + first * row_bytes;
    parallel_for(n, (1 << 20) / row_bytes, [&](int64_t begin, int64_t end) {
      make_pages(rows + begin * row_bytes, (end - begin) * row_bytes);
    });
  }

  // What the sweeps before this one have added to the bias's gradient
  std::vector<double> earlier_bias_sums(const Sweep& sweep, int64_t first, int64_t n) const {
    std::vector<double> sums(grads_.needs_bias() ? n : 0);
    if (grads_.needs_bias() && sweep.first_row > 0) {
      std::copy_n(grads_.bias.const_data_ptr<float>() + first, n, sums.begin());
    }
    return sums;
  }

  // Sums are float32 within a block of rows and double across blocks
  void add_column_sums(const float* x, int64_t m, int64_t n, double* sums) const {
    std::vector<float> block_sums(n, 0.0f);
    for (int64_t i = 0; i < m; ++i) {
      tile_kernels<float>().add_scaled(block_sums.data(), x + i * n, 1.0f, n);
    }
    for (int64_t j = 0; j < n; ++j) sums[j] += block_sums[j];
  }

  void store_bias(const std::vector<double>& sums, int64_t first) {
    const std::vector<float> rounded(sums.begin(), sums.end());
    dispatch_float(grads_.bias.scalar_type(), [&](auto element) {
      using T = decltype(element);
      T* out = static_cast<T*>(grads_.bias.mutable_data_ptr()) + first;
      tile_kernels<T>().store_scaled(out, rounded.data(), 1.0f, rounded.size());
    });
  }

  Tensor weight_;
  LinearLossGradients grads_;
  int64_t tokens_;      // in a full block
  bool narrow_;         // 16-bit inputs: a block of the weight and of its gradient are widened
  Tensor hidden_;       // [rows, D]
  Tensor logits_;       // [kRows, tokens_]
  Tensor wide_weight_;  // [tokens_, D]
  Tensor wide_grad_;    // [tokens_, D]
};

}  // namespace dmax::cpu
