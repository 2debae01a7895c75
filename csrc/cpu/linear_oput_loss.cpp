// Cross-entropy of both passes from the hidden states, and the gradients of hidden states and head.
//
// The logits exist as one block of [kGradRows, kGradTokens] float32. Rows of both passes are
// stacked, ignored ones left out, so a block of the weight is read (and widened) once for both
// passes. The backward pass computes each block of logits again, which costs one product in four
// and saves rows x V numbers; every weight block's gradient is finished and rounded before the next
// begins. bfloat16 has a way of its own where the CPU multiplies it as stored: linear_loss_amx.h.
#include "checks/linear.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <memory>

#include "cpu/linear_loss_amx.h"
#include "cpu/linear_rows.h"
#include "cpu/loss_rows.h"
#include "cpu/stacked_rows.h"

namespace dmax::cpu {

namespace {

// Large enough that a block's three products outweigh the waits between them; 8 MiB of float32
constexpr int64_t kGradTokens = 4096;
constexpr int64_t kGradRows = 512;

std::vector<float> widened_bias(const OptionalTensor& bias) {
  if (!bias) return {};
  std::vector<float> wide(bias->numel(), 0.0f);
  const Tensor values = torch::stable::contiguous(*bias);
  dispatch_float(bias->scalar_type(), [&](auto element) {
    using T = decltype(element);
    tile_kernels<T>().add_scaled(wide.data(), static_cast<const T*>(values.const_data_ptr()), 1.0f,
                                 values.numel());
  });
  return wide;
}

// Rows [from, from + count)
Tensor part(Tensor matrix, int64_t from, int64_t count) {
  return torch::stable::narrow(matrix, 0, from, count);
}

// The same in float32: themselves where they are, else widened into `buffer`
Tensor widened_part(const Tensor& matrix, int64_t from, int64_t count, const Tensor& buffer) {
  const Tensor rows = part(matrix, from, count);
  if (matrix.scalar_type() == ScalarType::Float) return rows;
  Tensor wide = part(buffer, 0, count);
  torch::stable::copy_(wide, rows);
  return wide;
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// out = a b + (first ? 0 : out) in float32, past the dispatcher and so past autocast
void accumulate_product(const Tensor& a, const Tensor& b, bool first, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), first ? 0.0 : 1.0, 1.0));
}

// 16-bit hidden states in the layout of the product kernels, one buffer per block of rows
std::vector<std::unique_ptr<AlignedBuffer>> packed_rows(const StackedRows& stacked,
                                                        const Tensor& weight) {
  const int64_t dim = weight.size(1);
  std::vector<std::unique_ptr<AlignedBuffer>> blocks;
  const Tensor buffer =
      empty_like_device(weight, {std::min(stacked.size(), kGradRows), dim}, weight.scalar_type());
  for (int64_t row = 0; row < stacked.size(); row += kGradRows) {
    const int64_t m = std::min(kGradRows, stacked.size() - row);
    gather_rows(stacked, row, m, buffer);
    dispatch_float(weight.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const ProductKernels<T>& products = product_kernels<T>();
      blocks.push_back(std::make_unique<AlignedBuffer>(products.packed_bytes(m, dim)));
      products.pack_rows(matrix_view<T>(buffer), m, dim, blocks.back()->data);
    });
  }
  return blocks;
}

// logits[i * stride + j] of m packed rows and of tokens first .. first + n, not rounded to 16 bits
void packed_product(const AlignedBuffer& packed, int64_t m, const Tensor& weight, int64_t first,
                    int64_t n, float* logits, int64_t stride) {
  const int64_t dim = weight.size(1);
  dispatch_float(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const ProductKernels<T>& products = product_kernels<T>();
    const MatrixView<T> view = matrix_view<T>(weight);
    parallel_for((n + kProductTokens - 1) / kProductTokens, 1, [&](int64_t begin, int64_t end) {
      const AlignedBuffer scratch(products.scratch_bytes(dim, m));
      for (int64_t t = begin * kProductTokens; t < std::min(n, end * kProductTokens);
           t += kProductTokens) {
        const MatrixView<T> tokens{view.row(first + t), view.row_stride, view.column_stride};
        products.multiply(tokens, std::min(kProductTokens, n - t), dim, packed.data, m,
                          scratch.data, logits + t, stride);
      }
    });
  });
}

struct PassResults {
  Tensor loss;
  Tensor logsumexp;
};

PassResults empty_results(const OptionalTensor& hidden, const Tensor& weight,
                          const Tensor& target) {
  const Sizes sizes = hidden ? sizes_of(target) : Sizes{0};
  return {torch::stable::new_zeros(weight, sizes, ScalarType::Float),
          torch::stable::new_zeros(weight, sizes, ScalarType::Float)};
}

// sums[j] += sum_i x[i, j] of a block, in double from block to block
void add_column_sums(const float* x, int64_t rows, int64_t row_stride, int64_t columns,
                     double* sums) {
  constexpr int64_t kColumns = 256;
  parallel_for((columns + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kColumns;
      const int64_t n = std::min(kColumns, columns - first);
      float block_sums[kColumns] = {};
      for (int64_t i = 0; i < rows; ++i) {
        tile_kernels<float>().add_scaled(block_sums, x + i * row_stride + first, 1.0f, n);
      }
      for (int64_t j = 0; j < n; ++j) sums[first + j] += block_sums[j];
    }
  });
}

// What the forward pass keeps of the tokens of a row that it has seen
struct LossState {
  OnlineStats stats;
  float target_logit = 0;  // of the one group that holds the target
  double logit_sum = 0;    // where labels are smoothed

  void merge(const LossState& later) {
    stats.merge(later.stats, 1.0);
    target_logit += later.target_logit;
    logit_sum += later.logit_sum;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_oput_loss(
    OptionalTensor hidden_masked, OptionalTensor hidden_predicted, Tensor weight, Tensor target,
    OptionalTensor bias, int64_t ignore_index, double label_smoothing, double z_loss) {
  constexpr const char* op = "linear_oput_loss";
  const LinearSizes sizes = check_linear_oput_loss(hidden_masked, hidden_predicted, weight, target,
                                                   bias, ignore_index, label_smoothing, z_loss);
  const Tensor ids = checked_targets(op, target, sizes.vocab, ignore_index);
  const int64_t* targets = ids.const_data_ptr<int64_t>();
  const LossOptions options{ignore_index, label_smoothing, z_loss};
  const std::array<PassResults, kPasses> results{empty_results(hidden_masked, weight, target),
                                                 empty_results(hidden_predicted, weight, target)};
  const StackedRows stacked = stacked_rows(hidden_masked, hidden_predicted, ids, ignore_index);
  const int64_t block = std::min(stacked.size(), kLinearRows);
  const Tensor buffer = empty_like_device(weight, {block, sizes.dim}, weight.scalar_type());
  for (int64_t first_row = 0; first_row < stacked.size(); first_row += block) {
    const int64_t m = std::min(block, stacked.size() - first_row);
    gather_rows(stacked, first_row, m, buffer);
    const auto row_of = [&](int64_t i) -> const StackedRow& { return stacked.rows[first_row + i]; };
    reduce_linear_rows<LossState>(
        part(buffer, 0, m), weight, bias, -1,
        [&](int64_t i, LossState& state, const TileKernels<float>& kernels, const float* x,
            int64_t n, int64_t first_id) {
          state.stats.add(kernels, x, n, first_id, 1.0);
          const int64_t place = targets[row_of(i).row] - first_id;
          if (place >= 0 && place < n) state.target_logit = x[place];
          if (label_smoothing != 0) state.logit_sum += kernels.sum(x, n, 0.0f);
        },
        [](LossState& state, const LossState& later) { state.merge(later); },
        [&](int64_t i, const LossState& state) {
          const double maximum = state.stats.maximum;
          const double log_rest = std::isfinite(maximum) ? std::log1p(state.stats.rest)
                                                         : std::numeric_limits<double>::quiet_NaN();
          const auto [pass, row] = row_of(i);
          results[pass].loss.mutable_data_ptr<float>()[row] =
              static_cast<float>(loss_of_row(maximum, log_rest, state.target_logit, options, [&] {
                return maximum - state.logit_sum / sizes.vocab;
              }));
          results[pass].logsumexp.mutable_data_ptr<float>()[row] =
              static_cast<float>(maximum + log_rest);
        });
  }
  return {results[0].loss, results[1].loss, results[0].logsumexp, results[1].logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_oput_loss_backward(
    Tensor grad_masked, Tensor grad_predicted, OptionalTensor hidden_masked,
    OptionalTensor hidden_predicted, Tensor weight, Tensor target, Tensor logsumexp_masked,
    Tensor logsumexp_predicted, OptionalTensor bias, int64_t ignore_index, double label_smoothing,
    double z_loss, bool needs_masked, bool needs_predicted, bool needs_weight, bool needs_bias) {
  constexpr const char* op = "linear_oput_loss_backward";
  const auto [vocab, dim] = check_linear_oput_loss_backward(
      grad_masked, grad_predicted, hidden_masked, hidden_predicted, weight, target,
      logsumexp_masked, logsumexp_predicted, bias, ignore_index, label_smoothing, z_loss,
      needs_masked, needs_predicted, needs_weight, needs_bias);
  const Tensor ids = checked_targets(op, target, vocab, ignore_index);
  const int64_t* targets = ids.const_data_ptr<int64_t>();
  const LossOptions options{ignore_index, label_smoothing, z_loss};
  // Contiguous: an expanded 1 comes with stride 0
  const std::array<Tensor, kPasses> grad_losses{torch::stable::contiguous(grad_masked),
                                                torch::stable::contiguous(grad_predicted)};
  const std::array<Tensor, kPasses> log_sums{torch::stable::contiguous(logsumexp_masked),
                                             torch::stable::contiguous(logsumexp_predicted)};
  const auto buffer = [&](int64_t rows, int64_t width) {
    return empty_like_device(weight, {rows, width}, ScalarType::Float);
  };

  const StackedRows stacked = stacked_rows(hidden_masked, hidden_predicted, ids, ignore_index);
  const int64_t num_rows = stacked.size();
  const bool needs_hidden =
      (needs_masked && hidden_masked) || (needs_predicted && hidden_predicted);
  needs_bias = needs_bias && bias.has_value();
  Tensor grad_hidden = buffer(needs_hidden ? num_rows : 0, dim);
  // With a row to learn from, every element is written below
  Tensor grad_weight =
      empty_like_device(weight, needs_weight ? Sizes{vocab, dim} : Sizes{0}, weight.scalar_type());
  if (num_rows == 0) torch::stable::zero_(grad_weight);
  Tensor grad_bias =
      torch::stable::new_zeros(weight, {needs_bias ? vocab : 0}, weight.scalar_type());
  const std::vector<float> bias_values = widened_bias(bias);
  const TileKernels<float>& kernels = tile_kernels<float>();
  const auto row_gradient = [&](int64_t i, float* x, int64_t first, int64_t n) {
    if (bias) kernels.add_scaled(x, bias_values.data() + first, 1.0f, n);
    const auto [pass, at] = stacked.rows[i];
    const int64_t place = targets[at] - first;
    loss_gradient(kernels, x, x, n, vocab, place < n ? std::max<int64_t>(place, -1) : -1,
                  log_sums[pass].const_data_ptr<float>()[at],
                  grad_losses[pass].const_data_ptr<float>()[at], options);
  };
  const auto all_gradients = [&] {
    const auto hidden_grads =
        scattered_gradients(stacked, {hidden_masked, hidden_predicted},
                            {needs_masked, needs_predicted}, weight, grad_hidden);
    return std::make_tuple(hidden_grads[0], hidden_grads[1], grad_weight, grad_bias);
  };

  if (weight.scalar_type() == ScalarType::BFloat16 && product_kernels<BFloat16>().narrow_products) {
    LinearLossGradients wanted{grad_hidden, grad_weight, grad_bias};
    AmxLossGradients(stacked, weight, wanted).run(row_gradient);
    return all_gradients();
  }
  const bool narrow = weight.scalar_type() != ScalarType::Float;
  const int64_t block_rows = std::min(num_rows, kGradRows);
  const int64_t block_tokens = std::min(vocab, kGradTokens);
  const Tensor hidden = widened_rows(stacked, weight, dim);
  const auto packed =
      narrow ? packed_rows(stacked, weight) : std::vector<std::unique_ptr<AlignedBuffer>>{};
  const Tensor weight_buffer = buffer(narrow ? block_tokens : 0, dim);
  const Tensor grad_buffer = buffer(narrow && needs_weight ? block_tokens : 0, dim);
  const Tensor logits = buffer(block_rows, block_tokens);
  float* logits_data = logits.mutable_data_ptr<float>();

  for (int64_t first = 0; first < vocab && num_rows > 0; first += block_tokens) {
    const int64_t n = std::min(block_tokens, vocab - first);
    const Tensor weight_block = widened_part(weight, first, n, weight_buffer);
    Tensor grad_block;
    if (needs_weight) grad_block = narrow ? part(grad_buffer, 0, n) : part(grad_weight, first, n);
    std::vector<double> column_sums(needs_bias ? n : 0);
    for (int64_t row = 0; row < num_rows; row += block_rows) {
      const int64_t m = std::min(block_rows, num_rows - row);
      const Tensor hidden_block = part(hidden, row, m);
      Tensor rows_of_logits = part(logits, 0, m);
      const Tensor x = torch::stable::narrow(rows_of_logits, 1, 0, n);
      if (narrow) {
        packed_product(*packed[row / block_rows], m, weight, first, n, logits_data, block_tokens);
      } else {
        accumulate_product(hidden_block, transposed(weight_block), true, x);
      }
      parallel_for(m, std::max<int64_t>(1, 16384 / n), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          row_gradient(row + i, logits_data + i * block_tokens, first, n);
        }
      });
      if (needs_hidden) accumulate_product(x, weight_block, first == 0, part(grad_hidden, row, m));
      if (needs_weight) {
        accumulate_product(transposed(x), hidden_block, row == 0, grad_block);
      }
      if (needs_bias) add_column_sums(logits_data, m, block_tokens, n, column_sums.data());
    }
    if (needs_weight && narrow) {
      Tensor out = part(grad_weight, first, n);
      torch::stable::copy_(out, grad_block);
    }
    if (needs_bias) {
      dispatch_float(weight.scalar_type(), [&](auto element) {
        using T = decltype(element);
        const std::vector<float> sums(column_sums.begin(), column_sums.end());
        T* out = static_cast<T*>(grad_bias.mutable_data_ptr()) + first;
        tile_kernels<T>().store_scaled(out, sums.data(), 1.0f, n);
      });
    }
  }
  return all_gradients();
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("linear_oput_loss", TORCH_BOX(&dmax::cpu::linear_oput_loss));
  m.impl("linear_oput_loss_backward", TORCH_BOX(&dmax::cpu::linear_oput_loss_backward));
}
