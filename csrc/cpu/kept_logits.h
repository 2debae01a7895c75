// Logits that are kept from the pass over the vocabulary that finds their rows' statistics to the
// pass that makes their gradients.
#pragma once

#include <algorithm>

#include "common/torch_stable.h"
#include "cpu/fresh_pages.h"

namespace dmax::cpu {

// Rows of float32 logits, cut into chunks of tokens: a chunk's rows lie one after the other
class KeptLogits {
 public:
  KeptLogits() = default;  // keeps no row
  // In memory of their own
  KeptLogits(const Tensor& like, int64_t rows, int64_t vocab, int64_t chunk)
      : rows_(rows),
        vocab_(vocab),
        chunk_(std::min(chunk, vocab)),
        token_bytes_(rows * kBytes),
        own_(empty_like_device(like, {rows, vocab}, ScalarType::Float)),
        data_(static_cast<char*>(own_->mutable_data_ptr())) {}

  // For at most most_rows_inside(), in the memory of the weight's gradient. A chunk's logits lie
  // where its tokens' gradients will be written, and must have been used by then.
  static KeptLogits inside(const Tensor& grad_weight, int64_t rows, int64_t chunk) {
    KeptLogits kept;
    kept.rows_ = rows;
    kept.vocab_ = grad_weight.size(0);
    kept.chunk_ = std::min(chunk, kept.vocab_);
    kept.token_bytes_ = token_bytes(grad_weight);
    kept.data_ = static_cast<char*>(grad_weight.mutable_data_ptr());
    return kept;
  }

  // How many rows to keep in memory of their own. Their logits may take a quarter of a float32
  // gradient of the weight (D / 4 rows), or 16 MiB if that is more: a bound that does not depend on
  // the number of rows.
  static int64_t most_rows(int64_t vocab, int64_t dim) {
    constexpr int64_t kLeastBytes = 16 << 20;
    constexpr int64_t kRowStep = 16;  // so that sweeps end with whole vectors of rows
    const int64_t bytes = std::max<int64_t>(kLeastBytes, vocab * dim * kBytes / 4);
    const int64_t rows = bytes / (vocab * kBytes);
    return std::max<int64_t>(1, rows < kRowStep ? rows : rows / kRowStep * kRowStep);
  }

  // How many rows the gradient's memory holds: D in float32, D / 2 in 16 bits
  static int64_t most_rows_inside(const Tensor& grad_weight) {
    return token_bytes(grad_weight) / kBytes;
  }

  int64_t rows() const { return rows_; }

  // Row `row`'s logits from token `first` on, up to the end of that token's chunk. The next row's
  // follow those of the chunk's last token.
  float* at(int64_t row, int64_t first) const {
    const int64_t start = first / chunk_ * chunk_;
    const int64_t width = std::min(chunk_, vocab_ - start);
    return reinterpret_cast<float*>(data_ + start * token_bytes_) + row * width + first - start;
  }

  // Keeps the logits of n tokens from `first` on
  void keep(int64_t row, int64_t first, const float* x, int64_t n) const {
    for (int64_t done = 0; done < n;) {
      const int64_t count = std::min(n - done, chunk_ - (first + done) % chunk_);
      std::copy_n(x + done, count, at(row, first + done));
      done += count;
    }
  }

  // Before any of n tokens' logits from `first` on are kept: the memory of the chunks that start
  // among them
  void make_chunk_pages(int64_t first, int64_t n) const {
    for (int64_t start = (first + chunk_ - 1) / chunk_ * chunk_; start < first + n;
         start += chunk_) {
      make_pages(at(0, start), rows_ * std::min(chunk_, vocab_ - start) * kBytes);
    }
  }

 private:
  static constexpr int64_t kBytes = sizeof(float);

  static int64_t token_bytes(const Tensor& grad_weight) {
    return grad_weight.size(1) * static_cast<int64_t>(grad_weight.element_size());
  }

  int64_t rows_ = 0;
  int64_t vocab_ = 1;
  int64_t chunk_ = 1;
  int64_t token_bytes_ = 0;  // from one token's part of the memory to the next
  OptionalTensor own_;
  char* data_ = nullptr;
};

// Some of the stacked rows, whose gradients one pass over the vocabulary makes. The logits of the
// first kept.rows() of them are kept, with their bias; those of the others are computed again.
struct Sweep {
  int64_t first_row;
  int64_t num_rows;
  KeptLogits kept;

  int64_t end() const { return first_row + num_rows; }
  // Rows from `row` on, at most `most`, that are either all kept or all not
  int64_t part(int64_t row, int64_t most) const {
    const int64_t kept_end = std::min(first_row + kept.rows(), end());  // the last sweep is shorter
    return std::min(most, (row < kept_end ? kept_end : end()) - row);
  }
  bool keeps(int64_t row) const { return row < first_row + kept.rows(); }
};

}  // namespace dmax::cpu
