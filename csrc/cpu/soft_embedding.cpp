// softmax(logits / temperature) x embedding, without stored probabilities.
//
// A first pass over the logits gives every row's maximum and sum of exponentials. The second goes
// through the vocabulary in blocks: the exponentials of a block relative to the maxima, and then
// their product with the block's rows of the embedding, which the threads share by columns. A token
// whose weight is negligible in every row takes no part, and its row of the embedding is not read.
// Most tokens are, once a model is sure of anything.
//
// Which product is used, as in linear_logits.h:
//
//   1 to 8 rows, or few weights that count    one scaled addition per weight
//   from 9 rows on                            PyTorch's float32 product
//   the same, bfloat16 with                   the product of soft_products.h, of rounded weights
//   AVX512-BF16 or AMX
#include "checks/soft_embedding.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/soft_products.h"

namespace dmax::cpu {

namespace {

// Rows that share one reading of the embedding
constexpr int64_t kSoftRows = 256;
// Columns that one thread takes at most: of kMixed tokens, they take 16 KiB in float32
constexpr int64_t kMostColumns = 512;
// Rows up to which a token's columns are not widened for all rows but as each one adds them
constexpr int64_t kNarrowRows = 2;

// The arguments that soft_embedding and its partial form share
struct SoftArguments {
  const char* op;
  const Tensor& logits;
  const Tensor& embedding;
  double temperature;
  const OptionalTensor& temperatures;
  const OptionalTensor& least;
  const OptionalTensor& last_id;
};

// Columns [from, from + count) of the embeddings of one block's tokens
template <class E>
struct Columns {
  MatrixView<E> embeddings;
  int64_t from;
  int64_t count;

  const E* of(int64_t token) const { return embeddings.row(token) + from; }
};

// sum[i, :] += weights[i, :] x embeddings, by PyTorch's product
template <class E>
void add_product(const SoftRows& rows, const BlockWeights& block, const Columns<E>& columns,
                 float* sum, int64_t dim) {
  const int64_t used = static_cast<int64_t>(block.tokens.size());
  const Tensor weights = borrowed_matrix(block.weight.data(), rows.count, used, kSoftTokens, 1);
  const Tensor sums = borrowed_matrix(sum + columns.from, rows.count, columns.count, dim, 1);
  if constexpr (std::is_same_v<E, float>) {
    if (block.tokens.back() - block.tokens.front() == used - 1) {  // adjacent, and float32 already
      const float* first = columns.of(block.tokens.front());
      return multiply_into(
          weights, borrowed_matrix(first, used, columns.count, columns.embeddings.row_stride, 1),
          true, sums);
    }
  }
  const std::unique_ptr<float[]> wide(new float[used * columns.count]);  // not set to 0
  for (int64_t j = 0; j < used; ++j) {
    tile_kernels<E>().widen(&wide[j * columns.count], columns.of(block.tokens[j]), columns.count);
  }
  multiply_into(weights, borrowed_matrix(wide.get(), used, columns.count, columns.count, 1), true,
                sums);
}

// The same, kMixed tokens at a time, so that a sum is loaded and stored once for all of them.
//
// A weight of 0 adds nothing, whichever tokens of other rows its own row meets here: a row's bits
// do not depend on the other rows.
template <class T, class Fetch>
void add_tokens(const SoftRows& rows, const BlockWeights& block, int64_t from, int64_t count,
                float* sum, int64_t dim, const Fetch& fetch) {
  const int64_t used = static_cast<int64_t>(block.tokens.size());
  // A sum per block, and a sum of these: fewer roundings than one long sum
  std::vector<float> part(rows.count * count, 0.0f);
  for (int64_t j = 0; j < used; j += kMixed) {
    const int64_t mixed = std::min<int64_t>(kMixed, used - j);
    const T* tokens[kMixed];
    for (int64_t t = 0; t < kMixed; ++t) {
      tokens[t] = t < mixed ? fetch(t, block.tokens[j + t]) : tokens[t - 1];
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      float weights[kMixed] = {};
      std::copy_n(block.row(i) + j, mixed, weights);
      if (*std::max_element(weights, weights + kMixed) == 0) continue;
      tile_kernels<T>().add_mixed(&part[i * count], tokens, weights, count);
    }
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    tile_kernels<float>().add_scaled(sum + i * dim + from, &part[i * count], 1.0f, count);
  }
}

template <class E>
void add_block(const SoftRows& rows, const BlockWeights& block, const Columns<E>& columns,
               float* sum, int64_t dim) {
  const int64_t from = columns.from;
  const int64_t count = columns.count;
  if (block.dense) {
    add_product(rows, block, columns, sum, dim);
  } else if (rows.count <= kNarrowRows || std::is_same_v<E, float>) {
    add_tokens<E>(rows, block, from, count, sum, dim,
                  [&](int64_t, int64_t token) { return columns.of(token); });
  } else {  // widened once for all rows
    std::vector<float> wide(kMixed * count);
    add_tokens<float>(rows, block, from, count, sum, dim, [&](int64_t t, int64_t token) {
      tile_kernels<E>().widen(&wide[t * count], columns.of(token), count);
      return static_cast<const float*>(&wide[t * count]);
    });
  }
}

// done(row, stats, sum) receives every row once, with its sum of exp((x - maximum) / T) e(token)
template <class T, class E, class Done>
void sum_embeddings(const SoftArguments& given, const SoftEmbeddingSizes& sizes, const Done& done) {
  const RowView view = row_view(given.logits);
  const RowView table = row_view(given.embedding);
  const std::vector<double> all =
      temperatures_of(given.op, sizes.rows, given.temperature, given.temperatures);
  const std::vector<Cut> cuts = cuts_of(sizes.rows, given.least, given.last_id);
  const MatrixView<E> embeddings{static_cast<const E*>(table.tensor.const_data_ptr()),
                                 table.row_stride, 1};
  const int64_t most_rows = std::min(sizes.rows, kSoftRows);
  constexpr int64_t kLine = 64;
  const int64_t share = (sizes.dim / num_threads() + kLine) / kLine * kLine;
  const int64_t columns = most_rows <= kNarrowRows ? share : std::min(kMostColumns, share);
  const int64_t chunks = (sizes.dim + columns - 1) / columns;
  BlockWeights block;
  block.weight.resize(most_rows * kSoftTokens);
  std::vector<float> sum(most_rows * sizes.dim);
  constexpr bool kMayRound = std::is_same_v<E, BFloat16>;
  RoundedProducts products(kMayRound ? most_rows : 0, sizes.dim);
  for (int64_t first_row = 0; first_row < sizes.rows; first_row += most_rows) {
    const int64_t count = std::min(most_rows, sizes.rows - first_row);
    const auto temperature_at = all.begin() + first_row;
    SoftRows rows{first_row,
                  count,
                  {temperature_at, temperature_at + count},
                  cuts.empty() ? nullptr : &cuts[first_row],
                  kMayRound && RoundedProducts::take(count),
                  {}};
    find_maxima<T>(view, &rows);
    apply_cuts(&rows);
    std::fill(sum.begin(), sum.end(), 0.0f);
    products.clear();
    for (int64_t first = 0; first < sizes.vocab; first += kSoftTokens) {
      weigh_block<T>(view, &rows, first, std::min(kSoftTokens, sizes.vocab - first), &block);
      if (block.tokens.empty()) continue;
      constexpr int64_t kGrain = 1 << 18;  // multiplications per thread
      const int64_t per_chunk = rows.count * static_cast<int64_t>(block.tokens.size()) * columns;
      parallel_for(chunks, kGrain / per_chunk, [&](int64_t begin, int64_t end) {
        if constexpr (kMayRound) {
          if (rows.rounds && block.dense) {
            return products.add(rows, block, embeddings.from_row(first), begin * columns,
                                std::min(sizes.dim, end * columns));
          }
        }
        // A product that reads the embedding where it is takes all of a thread's columns at once
        const int64_t step =
            block.dense && std::is_same_v<E, float> ? (end - begin) * columns : columns;
        for (int64_t from = begin * columns; from < std::min(sizes.dim, end * columns);
             from += step) {
          const int64_t count = std::min(step, sizes.dim - from);
          add_block(rows, block, Columns<E>{embeddings.from_row(first), from, count}, sum.data(),
                    sizes.dim);
        }
      });
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      if (rows.rounds) products.add_to(i, sum.data() + i * sizes.dim, sizes.dim);
      done(first_row + i, rows.stats[i], sum.data() + i * sizes.dim);
    }
  }
}

template <class Call>
void dispatch_both(const Tensor& logits, const Tensor& embedding, const Call& call) {
  dispatch_float(logits.scalar_type(), [&](auto logit) {
    dispatch_float(embedding.scalar_type(), [&](auto element) { call(logit, element); });
  });
}

Sizes embedding_sizes(const Tensor& logits, int64_t dim) {
  Sizes sizes = leading_sizes(logits);
  sizes.push_back(dim);
  return sizes;
}

}  // namespace

Tensor soft_embedding(Tensor logits, Tensor embedding, double temperature,
                      OptionalTensor temperatures, OptionalTensor least, OptionalTensor last_id) {
  const auto sizes =
      check_soft_embedding(logits, embedding, temperature, temperatures, least, last_id);
  Tensor out =
      empty_like_device(logits, embedding_sizes(logits, sizes.dim), embedding.scalar_type());
  dispatch_both(logits, embedding, [&](auto logit, auto element) {
    using E = decltype(element);
    E* data = static_cast<E*>(out.mutable_data_ptr());
    sum_embeddings<decltype(logit), E>(
        {"soft_embedding", logits, embedding, temperature, temperatures, least, last_id}, sizes,
        [&](int64_t row, const RowStats& stats, const float* sum) {
          const float factor = static_cast<float>(1.0 / stats.sum_exp());  // NaN if undefined
          tile_kernels<E>().store_scaled(data + row * sizes.dim, sum, factor, sizes.dim);
        });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> soft_embedding_partial(
    Tensor logits_shard, Tensor embedding_shard, double temperature, OptionalTensor temperatures,
    OptionalTensor least, OptionalTensor last_id) {
  const auto sizes = check_soft_embedding_partial(logits_shard, embedding_shard, temperature,
                                                  temperatures, least, last_id);
  Tensor maximum = empty_like_device(logits_shard, leading_sizes(logits_shard), ScalarType::Float);
  Tensor sum_exp = empty_like_device(logits_shard, leading_sizes(logits_shard), ScalarType::Float);
  Tensor weighted =
      empty_like_device(logits_shard, embedding_sizes(logits_shard, sizes.dim), ScalarType::Float);
  float* maxima = maximum.mutable_data_ptr<float>();
  float* sums = sum_exp.mutable_data_ptr<float>();
  float* products = weighted.mutable_data_ptr<float>();
  dispatch_both(logits_shard, embedding_shard, [&](auto logit, auto element) {
    sum_embeddings<decltype(logit), decltype(element)>(
        {"soft_embedding_partial", logits_shard, embedding_shard, temperature, temperatures, least,
         last_id},
        sizes, [&](int64_t row, const RowStats& stats, const float* sum) {
          const bool empty = stats.maximum == -std::numeric_limits<float>::infinity();
          maxima[row] = stats.maximum;
          sums[row] = empty ? 0.0f : static_cast<float>(stats.sum_exp());
          const float factor = stats.defined() || empty ? 1.0f : sums[row];  // NaN throughout
          for (int64_t k = 0; k < sizes.dim; ++k) products[row * sizes.dim + k] = sum[k] * factor;
        });
  });
  return {maximum, sum_exp, weighted};
}

std::tuple<Tensor, Tensor> top_p_cut(Tensor logits, double top_p, double temperature,
                                     OptionalTensor temperatures) {
  const int64_t vocab = check_top_p_cut(logits, top_p, temperature, temperatures);
  const RowView view = row_view(logits);
  const std::vector<double> all =
      temperatures_of("top_p_cut", view.rows, temperature, temperatures);
  Tensor least = empty_like_device(logits, leading_sizes(logits), ScalarType::Float);
  Tensor last_id = empty_like_device(logits, leading_sizes(logits), ScalarType::Long);
  float* values = least.mutable_data_ptr<float>();
  int64_t* ids = last_id.mutable_data_ptr<int64_t>();
  DrawOptions options;
  options.top_p = top_p;
  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    draw_rows<T>(
        view.rows, vocab,
        [&](int64_t i) { return VisibleRow<T>{data + i * view.row_stride, vocab, -1, nullptr}; },
        [&](int64_t i) { return all[i]; },
        [&](int64_t i, const RowDraw<T>& row, DrawScratch* scratch) {
          DrawOptions of_row = options;
          of_row.temperature = row.temperature;
          const Cut cut = row.defined() ? filter_row(row, of_row, &scratch->filters) : Cut{};
          values[i] = cut.value;
          ids[i] = std::min(cut.last_id, vocab - 1);
        });
  });
  return {least, last_id};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("soft_embedding", TORCH_BOX(&dmax::cpu::soft_embedding));
  m.impl("soft_embedding_partial", TORCH_BOX(&dmax::cpu::soft_embedding_partial));
  m.impl("top_p_cut", TORCH_BOX(&dmax::cpu::top_p_cut));
}
