// Logits that are kept from the pass over the vocabulary that finds their rows' statistics to the
// pass that makes their gradients.
#pragma once

#include <algorithm>

#include "common/torch_stable.h"

namespace dmax::cpu {

// Rows of float32 logits, cut into chunks of tokens: a chunk's rows lie one after the other
class KeptLogits {
 public:
  KeptLogits() = default;  // keeps no row
  KeptLogits(const Tensor& like, int64_t rows, int64_t vocab, int64_t chunk)
      : rows_(rows),
        chunk_(std::min(chunk, vocab)),
        logits_(empty_like_device(like, {(vocab + chunk_ - 1) / chunk_ * rows, chunk_},
                                  ScalarType::Float)),
        data_(logits_->mutable_data_ptr<float>()) {}

  // How many rows to keep. Their logits may take a quarter of a float32 gradient of the weight (D /
  // 4 rows), or 16 MiB if that is more: a bound that does not depend on the number of rows.
  static int64_t most_rows(int64_t vocab, int64_t dim) {
    constexpr int64_t kLeastBytes = 16 << 20;
    constexpr int64_t kRowStep = 16;  // so that sweeps end with whole vectors of rows
    const int64_t bytes = std::max<int64_t>(kLeastBytes, vocab * dim * sizeof(float) / 4);
    const int64_t rows = bytes / (vocab * sizeof(float));
    return std::max<int64_t>(1, rows < kRowStep ? rows : rows / kRowStep * kRowStep);
  }

  int64_t rows() const { return rows_; }
  int64_t stride() const { return chunk_; }  // between the rows of a chunk

  // Row `row`'s logits from token `first` on, up to the end of that token's chunk
  float* at(int64_t row, int64_t first) const {
    return data_ + (first / chunk_ * rows_ + row) * chunk_ + first % chunk_;
  }

 private:
  int64_t rows_ = 0;
  int64_t chunk_ = 1;
  OptionalTensor logits_;
  float* data_ = nullptr;
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
    const int64_t kept_end = first_row + kept.rows();
    return std::min(most, (row < kept_end ? kept_end : end()) - row);
  }
  bool keeps(int64_t row) const { return row < first_row + kept.rows(); }
};

}  // namespace dmax::cpu
