// Softmax statistics of rows of hidden x weight^T, whose logits exist one small block at a time.
//
// The vocabulary is cut into groups of blocks in a way that depends only on its size. A thread
// takes whole groups: it computes products into its own buffer and reduces them while a cache holds
// them, without waiting for other threads. A row's groups are merged in ascending order. Memory
// depends on D and the number of threads, not on the vocabulary or the rows.
#pragma once

#include "checks/linear.h"
#include "cpu/linear_logits.h"

namespace dmax::cpu {

// Bounds the partial results: 256 groups x 256 rows x 40 bytes
constexpr int64_t kMostGroups = 256;

// Called before a thread adds to `state`, whose group follows that of `earlier`: what is known
// there may spare work, but must not show in the row's result, as a thread's first group has none
// before.
template <class State>
void follow(State& /*state*/, const State& /*earlier*/) {}

// State is what one row keeps about the tokens it has seen. add(row, state, x, n, first_id) adds
// the logits x of n tokens to it, merge(state, later) adds the tokens of a later group, and
// done(row, state) receives every row once.
template <class State, class T, class Add, class Merge, class Done>
void reduce_linear_rows_of(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                           int64_t suppress_token, const Add& add, const Merge& merge,
                           const Done& done) {
  const int64_t vocab = weight.size(0);
  const int64_t dim = weight.size(1);
  const Tensor rows = torch::stable::reshape(hidden, {hidden.numel() / dim, dim});
  const int64_t num_rows = rows.size(0);
  const TileKernels<float>& kernels = tile_kernels<float>();
  const T* bias_data = nullptr;
  OptionalTensor bias_c;
  if (bias) {
    bias_c = as_contiguous(*bias);
    bias_data = static_cast<const T*>(bias_c->const_data_ptr());
  }

  const int64_t blocks = (vocab + kLinearTokens - 1) / kLinearTokens;
  const int64_t blocks_per_group = (blocks + kMostGroups - 1) / kMostGroups;
  const int64_t group_tokens = blocks_per_group * kLinearTokens;
  const int64_t groups = (vocab + group_tokens - 1) / group_tokens;
  const int64_t most_rows = std::min(num_rows, kLinearRows);
  LinearLogits<T> products(matrix_view<T>(rows), matrix_view<T>(weight), dim, most_rows);
  std::vector<State> states(groups * most_rows);

  for (int64_t first_row = 0; first_row < num_rows; first_row += most_rows) {
    const int64_t m = std::min(most_rows, num_rows - first_row);
    products.load_rows(first_row, m);
    std::fill(states.begin(), states.end(), State{});
    // Multiplications per thread; with fewer, waking a thread costs more than it saves
    constexpr int64_t kGrain = 1 << 21;
    parallel_for(groups, kGrain / (m * dim * group_tokens), [&](int64_t begin, int64_t end) {
      AlignedBuffer scratch = products.scratch();
      std::vector<float> logits(m * kLinearTokens);
      const int64_t last = std::min(vocab, end * group_tokens);
      for (int64_t first = begin * group_tokens; first < last; first += kLinearTokens) {
        const int64_t n = std::min(kLinearTokens, last - first);
        products.compute(first, n, scratch, logits.data());
        State* group_states = states.data() + first / group_tokens * most_rows;
        const bool follows = first % group_tokens == 0 && first > begin * group_tokens;
        for (int64_t i = 0; i < m; ++i) {
          if (follows) follow(group_states[i], group_states[i - most_rows]);
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
