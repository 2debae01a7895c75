#include "checks/step.h"

#include <numeric>

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/mixture.h"
#include "cpu/parallel.h"

namespace dmax::cpu {

namespace {

// token, confidence and masked, contiguous and checked
struct Positions {
  Tensor token;       // i64 [N, k]
  Tensor confidence;  // f32 [N, k]
  Tensor masked;      // bool [N]
  EmbeddingSizes sizes;

  bool is_masked(int64_t i) const { return masked.const_data_ptr<bool>()[i]; }
  Mixture mixture(int64_t i) const {
    return {sizes.k, token.const_data_ptr<int64_t>() + i * sizes.k,
            confidence.const_data_ptr<float>() + i * sizes.k};
  }
};

Positions checked_positions(const char* op, const Tensor& token, const Tensor& confidence,
                            const Tensor& masked, const EmbeddingSizes& sizes) {
  Positions positions{as_contiguous(as_long(token)), as_contiguous(confidence),
                      as_contiguous(masked), sizes};
  const int64_t* ids = positions.token.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < sizes.positions * sizes.k; ++i) {
    DMAX_CHECK(positions.is_masked(i / sizes.k) || (ids[i] >= 0 && ids[i] < sizes.vocab), op,
               ": token must be an id in [0, ", sizes.vocab, ") wherever masked is False, got ",
               ids[i], " at position ", i / sizes.k);
  }
  return positions;
}

// What position i adds to one row's gradient: factor_grad * g_i + sum_j factor_j e(y_j) + ...
//
// With u = mix / |mix|, a = target / |mix|: d mix = a (g - u (u.g)), d target = g.u, and
//   d e(y_j) = p_j (d mix + d target e(y_j) / |e(y_j)|),  d e(mask) likewise with the residual.
struct PositionGradient {
  float grad;    // coefficient of g in d mix: a
  float mix;     // coefficient of the mix in d mix: -a (mix.g) / |mix|^2
  float target;  // d target
  MixtureNorms norms;
  float mask_dot;  // the parts of mix.g, for d p
  float token_dot[kMaxTopK];
};

template <class T>
PositionGradient position_gradient(const EmbeddingTable<T>& table, const Mixture& mixture,
                                   int64_t mask_token_id, const T* g, float* mix,
                                   float* grad_confidence) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const T* e_mask = table.row(mask_token_id);
  const float residual = mixture.residual();
  PositionGradient d{};
  d.norms = mix_embeddings(table, mixture, mask_token_id, mix);
  std::fill_n(grad_confidence, mixture.k, 0.0f);
  if (d.norms.mix == 0) return d;  // h is 0 there, and stays 0

  // g . mix as a sum of its parts, since d p needs each of them
  d.mask_dot = static_cast<float>(kernels.dot(e_mask, g, table.dim));
  double mix_dot = static_cast<double>(residual) * d.mask_dot;
  for (int64_t j = 0; j < mixture.k; ++j) {
    d.token_dot[j] = static_cast<float>(kernels.dot(table.row(mixture.token[j]), g, table.dim));
    mix_dot += static_cast<double>(mixture.confidence[j]) * d.token_dot[j];
  }
  const double a = static_cast<double>(d.norms.target) / d.norms.mix;
  const double mix_squared = static_cast<double>(d.norms.mix) * d.norms.mix;
  d.grad = static_cast<float>(a);
  d.mix = static_cast<float>(-a * mix_dot / mix_squared);
  d.target = static_cast<float>(mix_dot / d.norms.mix);

  // d p_j = d mix . (e(y_j) - e(mask)) + d target (|e(y_j)| - |e(mask)|)
  std::vector<float> e_mask_wide(table.dim, 0.0f);
  std::vector<float> e_token_wide(table.dim);
  kernels.add_scaled(e_mask_wide.data(), e_mask, 1.0f, table.dim);
  const TileKernels<float>& wide = tile_kernels<float>();
  const double mask_part = residual > 0 ? d.grad * static_cast<double>(d.mask_dot) +
                                              d.mix * wide.dot(mix, e_mask_wide.data(), table.dim) +
                                              static_cast<double>(d.target) * d.norms.mask
                                        : 0.0;
  for (int64_t j = 0; j < mixture.k; ++j) {
    std::fill(e_token_wide.begin(), e_token_wide.end(), 0.0f);
    kernels.add_scaled(e_token_wide.data(), table.row(mixture.token[j]), 1.0f, table.dim);
    const double token_part = d.grad * static_cast<double>(d.token_dot[j]) +
                              d.mix * wide.dot(mix, e_token_wide.data(), table.dim) +
                              static_cast<double>(d.target) * d.norms.token[j];
    grad_confidence[j] = static_cast<float>(token_part - mask_part);
  }
  return d;
}

// sum += weight * (d mix + d target e / |e|) of one position, over columns [from, to)
template <class T>
void add_row_gradient(const EmbeddingTable<T>& table, const Mixture& mixture, int64_t mask_token_id,
                      const PositionGradient& d, const T* g, float weight, int64_t token,
                      float token_norm, int64_t from, int64_t to, float* sum) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t count = to - from;
  kernels.add_scaled(sum, g + from, weight * d.grad, count);
  for (int64_t j = 0; j < mixture.k; ++j) {
    kernels.add_scaled(sum, table.row(mixture.token[j]) + from,
                       weight * d.mix * mixture.confidence[j], count);
  }
  kernels.add_scaled(sum, table.row(mask_token_id) + from, weight * d.mix * mixture.residual(),
                     count);
  if (token_norm > 0) {
    kernels.add_scaled(sum, table.row(token) + from, weight * d.target / token_norm, count);
  }
}

template <class T>
EmbeddingTable<T> table_of(const RowView& view) {
  return {static_cast<const T*>(view.tensor.const_data_ptr()), view.row_stride, view.width};
}

}  // namespace

Tensor hybrid_embedding(Tensor embedding, Tensor token, Tensor confidence, Tensor masked,
                        int64_t mask_token_id) {
  const auto sizes = check_hybrid_embedding(embedding, token, confidence, masked, mask_token_id);
  const Positions positions =
      checked_positions("hybrid_embedding", token, confidence, masked, sizes);
  Sizes out_sizes = sizes_of(masked);
  out_sizes.push_back(sizes.dim);
  Tensor out = empty_like_device(embedding, out_sizes, embedding.scalar_type());
  const RowView view = row_view(embedding);
  dispatch_float(embedding.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const EmbeddingTable<T> table = table_of<T>(view);
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    const T* e_mask = table.row(mask_token_id);
    constexpr int64_t kGrain = 16384;  // elements per thread
    parallel_for(sizes.positions, kGrain / sizes.dim, [&](int64_t begin, int64_t end) {
      std::vector<float> mix(sizes.dim);
      for (int64_t i = begin; i < end; ++i) {
        T* h = out_data + i * sizes.dim;
        if (positions.is_masked(i)) {
          std::copy_n(e_mask, sizes.dim, h);
        } else {
          store_hybrid(table, positions.mixture(i), mask_token_id, mix.data(), h);
        }
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> hybrid_embedding_backward(Tensor grad_output, Tensor embedding,
                                                     Tensor token, Tensor confidence, Tensor masked,
                                                     int64_t mask_token_id) {
  const auto sizes = check_hybrid_embedding_backward(grad_output, embedding, token, confidence,
                                                     masked, mask_token_id);
  const Positions positions =
      checked_positions("hybrid_embedding_backward", token, confidence, masked, sizes);
  Tensor grad_embedding = torch::stable::new_zeros(embedding, sizes_of(embedding));
  Tensor grad_confidence =
      torch::stable::new_zeros(confidence, sizes_of(confidence), ScalarType::Float);
  const RowView view = row_view(embedding);
  const Tensor grad_c = as_contiguous(grad_output);
  float* grad_confidence_out = grad_confidence.mutable_data_ptr<float>();

  dispatch_float(embedding.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const EmbeddingTable<T> table = table_of<T>(view);
    const TileKernels<T>& kernels = tile_kernels<T>();
    const T* grads = static_cast<const T*>(grad_c.const_data_ptr());
    T* grad_rows = static_cast<T*>(grad_embedding.mutable_data_ptr());
    const auto grad_at = [&](int64_t i) { return grads + i * sizes.dim; };

    // The coefficients of every position
    std::vector<PositionGradient> gradients(sizes.positions);
    parallel_for(sizes.positions, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> mix(sizes.dim);
      for (int64_t i = begin; i < end; ++i) {
        if (positions.is_masked(i)) continue;
        gradients[i] = position_gradient(table, positions.mixture(i), mask_token_id, grad_at(i),
                                         mix.data(), grad_confidence_out + i * sizes.k);
      }
    });

    // Tokens: one thread sums the positions of a table row, in ascending order
    struct Share {
      int64_t token;
      int64_t position;
      int64_t slot;
    };
    std::vector<Share> shares;
    for (int64_t i = 0; i < sizes.positions; ++i) {
      if (positions.is_masked(i)) continue;
      for (int64_t j = 0; j < sizes.k; ++j) {
        const int64_t id = positions.mixture(i).token[j];
        if (id != mask_token_id) shares.push_back({id, i, j});
      }
    }
    std::stable_sort(shares.begin(), shares.end(),
                     [](const Share& a, const Share& b) { return a.token < b.token; });
    std::vector<int64_t> starts;
    for (size_t s = 0; s < shares.size(); ++s) {
      if (s == 0 || shares[s].token != shares[s - 1].token) starts.push_back(s);
    }
    starts.push_back(shares.size());
    parallel_for(static_cast<int64_t>(starts.size()) - 1, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(sizes.dim);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t s = starts[row]; s < starts[row + 1]; ++s) {
          const auto& [id, i, j] = shares[s];
          const Mixture mixture = positions.mixture(i);
          add_row_gradient(table, mixture, mask_token_id, gradients[i], grad_at(i),
                           mixture.confidence[j], id, gradients[i].norms.token[j], 0, sizes.dim,
                           sum.data());
        }
        kernels.store_scaled(grad_rows + shares[starts[row]].token * sizes.dim, sum.data(), 1.0f,
                             sizes.dim);
      }
    });

    // The mask embedding: every position adds to this row, so the threads split its columns instead
    constexpr int64_t kColumns = 64;
    parallel_for((sizes.dim + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = begin * kColumns;
      const int64_t to = std::min(sizes.dim, end * kColumns);
      std::vector<float> sum(to - from, 0.0f);
      for (int64_t i = 0; i < sizes.positions; ++i) {
        if (positions.is_masked(i)) {
          kernels.add_scaled(sum.data(), grad_at(i) + from, 1.0f, to - from);
          continue;
        }
        const Mixture mixture = positions.mixture(i);
        float weight = mixture.residual();
        for (int64_t j = 0; j < sizes.k; ++j) {  // a predicted mask token is this row, too
          if (mixture.token[j] == mask_token_id) weight += mixture.confidence[j];
        }
        add_row_gradient(table, mixture, mask_token_id, gradients[i], grad_at(i), weight,
                         mask_token_id, gradients[i].norms.mask, from, to, sum.data());
      }
      kernels.store_scaled(grad_rows + mask_token_id * sizes.dim + from, sum.data(), 1.0f,
                           to - from);
    });
  });
  return {grad_embedding, grad_confidence};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("hybrid_embedding", TORCH_BOX(&dmax::cpu::hybrid_embedding));
  m.impl("hybrid_embedding_backward", TORCH_BOX(&dmax::cpu::hybrid_embedding_backward));
}
