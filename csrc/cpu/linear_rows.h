// Softmax statistics of rows of hidden x weight^T, whose logits exist one small block at a time.
//
// The vocabulary is cut into groups of blocks, by its size alone. A thread takes whole groups: its
// own products into its own buffer, reduced while a cache holds them, with nothing to wait for. A
// row's groups are merged in ascending order, so its bits depend neither on the number of threads
// nor on the other rows. Memory depends on D and the threads, not on the vocabulary or the rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "checks/linear.h"
#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/parallel.h"
#include "cpu/product_kernels.h"
#include "cpu/tile_kernels.h"

namespace dmax::cpu {

// Rows that share one reading of the weight. At D = 2,048 in float32 they take 2 MiB when packed.
constexpr int64_t kLinearRows = 256;
// Tokens reduced at once: 256 KiB of logits for those rows
constexpr int64_t kLinearTokens = 4 * kProductTokens;
// Bounds the partial results: 256 groups x 256 rows x 40 bytes
constexpr int64_t kMostGroups = 256;

// Running statistics of one row over the vocabulary blocks so far
struct OnlineStats {
  float maximum = -std::numeric_limits<float>::infinity();
  int64_t token = 0;
  double rest = 0;  // sum of exp((x - maximum) / temperature) over all but the winner

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
        rest = moved_rest(block_maximum, temperature);
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

  // The statistics of later tokens of the same row
  void merge(const OnlineStats& later, double temperature) {
    if (std::isnan(maximum)) return;
    if (later.maximum > maximum || std::isnan(later.maximum)) {
      const double mine = moved_rest(later.maximum, temperature);
      *this = {later.maximum, later.token, later.rest + mine};
    } else if (std::isfinite(maximum)) {
      rest += later.moved_rest(maximum, temperature);
    }
  }

 private:
  // The whole sum, relative to a maximum that is not below this one
  double moved_rest(float to, double temperature) const {
    if (std::isinf(maximum)) return 0;
    return (rest + 1) * std::exp((static_cast<double>(maximum) - to) / temperature);
  }
};

// Any strides: what is neither copied nor widened as a whole
template <class T>
MatrixView<T> matrix_view(const Tensor& matrix) {
  return {static_cast<const T*>(matrix.const_data_ptr()), matrix.strides()[0], matrix.strides()[1]};
}

// Memory of a product's operands, aligned to a cache line
struct AlignedBuffer {
  explicit AlignedBuffer(int64_t bytes) : storage(bytes / sizeof(float) + kLine) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    data = storage.data() + (kLine - address / sizeof(float) % kLine) % kLine;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;

  static constexpr int64_t kLine = 64 / sizeof(float);
  std::vector<float> storage;
  float* data;
};

// State: what one row keeps of the tokens it has seen; add(row, state, x, n, first_id) puts the
// logits x of n tokens into it, merge(state, later) the tokens of a later group; done(row, state)
// receives every row once.
template <class State, class T, class Add, class Merge, class Done>
void reduce_linear_rows_of(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                           int64_t suppress_token, const Add& add, const Merge& merge,
                           const Done& done) {
  const int64_t vocab = weight.size(0);
  const int64_t dim = weight.size(1);
  const Tensor rows = torch::stable::reshape(hidden, {hidden.numel() / dim, dim});
  const int64_t num_rows = rows.size(0);
  const MatrixView<T> hidden_view = matrix_view<T>(rows);
  const MatrixView<T> weight_view = matrix_view<T>(weight);
  const ProductKernels<T>& products = product_kernels<T>();
  const TileKernels<float>& kernels = tile_kernels<float>();
  const T* bias_data = nullptr;
  OptionalTensor bias_c;
  if (bias) {
    bias_c = torch::stable::contiguous(*bias);
    bias_data = static_cast<const T*>(bias_c->const_data_ptr());
  }

  const int64_t blocks = (vocab + kLinearTokens - 1) / kLinearTokens;
  const int64_t blocks_per_group = (blocks + kMostGroups - 1) / kMostGroups;
  const int64_t group_tokens = blocks_per_group * kLinearTokens;
  const int64_t groups = (vocab + group_tokens - 1) / group_tokens;
  const int64_t most_rows = std::min(num_rows, kLinearRows);
  const AlignedBuffer packed(products.packed_bytes(most_rows, dim));
  std::vector<State> states(groups * most_rows);

  for (int64_t first_row = 0; first_row < num_rows; first_row += most_rows) {
    const int64_t m = std::min(most_rows, num_rows - first_row);
    const MatrixView<T> part{hidden_view.row(first_row), hidden_view.row_stride,
                             hidden_view.column_stride};
    products.pack_rows(part, m, dim, packed.data);
    std::fill(states.begin(), states.end(), State{});
    constexpr int64_t kGrain =
        1 << 21;  // products; below, waking a thread costs more than it saves
    parallel_for(groups, kGrain / (m * dim * group_tokens), [&](int64_t begin, int64_t end) {
      const AlignedBuffer scratch(products.scratch_bytes(dim, m));
      std::vector<float> logits(m * kLinearTokens);
      const int64_t last = std::min(vocab, end * group_tokens);
      for (int64_t first = begin * group_tokens; first < last; first += kLinearTokens) {
        const int64_t n = std::min(kLinearTokens, last - first);
        for (int64_t t = 0; t < n; t += kProductTokens) {
          const MatrixView<T> tokens{weight_view.row(first + t), weight_view.row_stride,
                                     weight_view.column_stride};
          products.multiply(tokens, std::min(kProductTokens, n - t), dim, packed.data, m,
                            scratch.data, logits.data() + t, kLinearTokens);
        }
        State* group_states = states.data() + first / group_tokens * most_rows;
        for (int64_t i = 0; i < m; ++i) {
          float* x = logits.data() + i * kLinearTokens;
          if (bias_data) tile_kernels<T>().add_scaled(x, bias_data + first, 1.0f, n);
          if (suppress_token >= first && suppress_token < first + n) {
            x[suppress_token - first] = -std::numeric_limits<float>::infinity();
          }
          add(first_row + i, group_states[i], kernels, x, n, first);
        }
      }
    });
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t group = 1; group < groups; ++group) {
        merge(states[i], states[group * most_rows + i]);
      }
      done(first_row + i, states[i]);
    }
  }
}

template <class State, class Add, class Merge, class Done>
void reduce_linear_rows(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                        int64_t suppress_token, const Add& add, const Merge& merge,
                        const Done& done) {
  dispatch_float(hidden.scalar_type(), [&](auto element) {
    reduce_linear_rows_of<State, decltype(element)>(hidden, weight, bias, suppress_token, add,
                                                    merge, done);
  });
}

}  // namespace dmax::cpu
