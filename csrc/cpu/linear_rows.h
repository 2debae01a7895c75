// Softmax statistics of rows of hidden x weight^T, whose logits exist one small block at a time.
//
// PyTorch's own GEMM computes [kLinearRows, kLinearTokens] logits in float32 (16-bit operands are
// widened block by block, so that logits are not rounded to 16 bits); the tile kernels reduce the
// block while a cache holds it. Memory depends on D alone, not on the vocabulary or the rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/parallel.h"
#include "cpu/tile_kernels.h"
#include "ops/linear_top1_confidence.h"

namespace dmax::cpu {

// At D = 2,048: 8 MiB of weights, 4 MiB of hidden states and 2 MiB of logits
constexpr int64_t kLinearTokens = 1024;
constexpr int64_t kLinearRows = 512;

// Running statistics of one row over the vocabulary blocks so far
struct OnlineStats {
  float maximum = -std::numeric_limits<float>::infinity();
  double rest = 0;  // sum of exp((x - maximum) / temperature) over all but the winner
  int64_t token = 0;

  float confidence() const {
    return static_cast<float>(std::isfinite(maximum) ? 1.0 / (1.0 + rest)
                                                     : std::numeric_limits<double>::quiet_NaN());
  }

  // The logits x of tokens first_id .. first_id + n
  void add(const TileKernels<float>& kernels, const float* x, int64_t n, int64_t first_id,
           double temperature) {
    if (std::isnan(maximum)) return;  // the first NaN has been found
    constexpr double kLog2E = 1.4426950408889634;
    constexpr double kNegligible = 30.0;  // exp(-30) from each of 262,144 tokens: below 3e-8
    const float scale = static_cast<float>(kLog2E / temperature);
    const float block_maximum = kernels.maximum(x, n);
    if (block_maximum > maximum || std::isnan(block_maximum)) {
      const int64_t place = kernels.find(x, n, block_maximum);
      if (std::isfinite(block_maximum)) {
        const bool first = std::isinf(maximum);
        const double drop = (static_cast<double>(maximum) - block_maximum) / temperature;
        rest = first ? 0 : (rest + 1) * std::exp(drop);
        rest += kernels.sum_exp(x, place, block_maximum, scale);
        rest += kernels.sum_exp(x + place + 1, n - place - 1, block_maximum, scale);
      }
      maximum = block_maximum;
      token = first_id + place;
    } else if (std::isfinite(maximum) &&
               (static_cast<double>(maximum) - block_maximum) / temperature < kNegligible) {
      rest += kernels.sum_exp(x, n, maximum, scale);
    }
  }
};

// torch::stable::narrow wants a handle that it may change; a copy of the handle is one
inline Tensor part(Tensor t, int64_t dim, int64_t from, int64_t count) {
  return torch::stable::narrow(t, dim, from, count);
}

// out = a b^T. The `out` form is not on autocast's list, which would make the product 16 bits wide
inline void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                    torch::stable::detail::from(torch::stable::transpose(b, 0, 1)),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference over
}

// Rows [from, from + count) of a matrix in float32: itself where it is, else widened into `buffer`
inline Tensor wide_rows(const Tensor& matrix, int64_t from, int64_t count, const Tensor& buffer) {
  Tensor rows = part(matrix, 0, from, count);
  if (matrix.scalar_type() == ScalarType::Float) return rows;
  Tensor wide = part(buffer, 0, 0, count);
  torch::stable::copy_(wide, rows);
  return wide;
}

inline Tensor as_matrix(const Tensor& hidden, int64_t dim) {
  return torch::stable::reshape(hidden, {dim == 0 ? 0 : hidden.numel() / dim, dim});
}

// add_block(row, x, n, first_id) receives every row's logits in ascending blocks; a row's calls
// come from one thread at a time, different rows' from several
template <class AddBlock>
void for_each_logits_block(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                           int64_t suppress_token, const AddBlock& add_block) {
  const int64_t vocab = weight.size(0);
  const int64_t dim = weight.size(1);
  const Tensor rows = as_matrix(hidden, dim);
  const int64_t num_rows = rows.size(0);
  const int64_t block_rows = std::min(num_rows, kLinearRows);
  const int64_t block_tokens = std::min(vocab, kLinearTokens);
  const bool narrow_inputs = hidden.scalar_type() != ScalarType::Float;
  const auto buffer = [&](int64_t n, int64_t width) {
    return empty_like_device(hidden, {n, width}, ScalarType::Float);
  };
  const Tensor hidden_buffer = buffer(narrow_inputs ? block_rows : 0, dim);
  const Tensor weight_buffer = buffer(narrow_inputs ? block_tokens : 0, dim);
  const Tensor logits = buffer(block_rows, block_tokens);
  float* logits_data = logits.mutable_data_ptr<float>();
  std::vector<float> bias_block(bias ? block_tokens : 0);
  const RowView bias_view = bias ? row_view(*bias) : RowView{hidden, 0, 0, 0};

  for (int64_t row = 0; row < num_rows; row += block_rows) {
    const int64_t m = std::min(block_rows, num_rows - row);
    const Tensor hidden_block = wide_rows(rows, row, m, hidden_buffer);
    for (int64_t first = 0; first < vocab; first += block_tokens) {
      const int64_t n = std::min(block_tokens, vocab - first);
      const Tensor out = part(part(logits, 0, 0, m), 1, 0, n);
      multiply_transposed(hidden_block, wide_rows(weight, first, n, weight_buffer), out);
      if (bias) {
        dispatch_float(bias->scalar_type(), [&](auto element) {
          using T = decltype(element);
          const T* values = static_cast<const T*>(bias_view.tensor.const_data_ptr()) + first;
          std::fill_n(bias_block.data(), n, 0.0f);
          tile_kernels<T>().add_scaled(bias_block.data(), values, 1.0f, n);
        });
      }
      constexpr int64_t kGrain = 65536;  // logits: below, waking a thread costs more than it saves
      parallel_for(m, kGrain / n, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          float* x = logits_data + i * block_tokens;
          if (bias) tile_kernels<float>().add_scaled(x, bias_block.data(), 1.0f, n);
          if (suppress_token >= first && suppress_token < first + n) {
            x[suppress_token - first] = -std::numeric_limits<float>::infinity();
          }
          add_block(row + i, x, n, first);
        }
      });
    }
  }
}

}  // namespace dmax::cpu
