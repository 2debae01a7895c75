// Eqs. 8-10 for one position; shared by hybrid_embedding and spd_step_.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks/rows.h"
#include "cpu/simd/tile_kernels.h"

namespace dmax::cpu {

template <class T>
struct EmbeddingTable {
  const T* data;
  int64_t row_stride;
  int64_t dim;

  const T* row(int64_t token) const { return data + token * row_stride; }
};

// The tokens of one position and their weights; the mask embedding takes the residual
struct Mixture {
  int64_t k;
  const int64_t* token;
  const float* confidence;

  // Eq. 8. A NaN confidence stays NaN: std::max would turn it into 0
  float residual() const {
    float residual = 1;
    for (int64_t j = 0; j < k; ++j) residual -= confidence[j];
    return residual < 0 ? 0 : residual;
  }
};

struct MixtureNorms {
  float token[kMaxTopK];  // |e(y_j)|
  float mask;             // |e(mask)|
  float mix;              // norm of the unnormalised mix, Eq. 9
  float target;           // Eq. 10: the mix of the norms
};

template <class T>
float norm(const TileKernels<T>& kernels, const T* x, int64_t dim) {
  return static_cast<float>(std::sqrt(kernels.dot(x, x, dim)));
}

// mix = sum_j p_j e(y_j) + residual e(mask), and all norms
template <class T>
MixtureNorms mix_embeddings(const EmbeddingTable<T>& table, const Mixture& mixture,
                            int64_t mask_token_id, float* mix) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const float residual = mixture.residual();
  const T* e_mask = table.row(mask_token_id);
  MixtureNorms norms;
  norms.mask = norm(kernels, e_mask, table.dim);
  norms.target = residual * norms.mask;
  std::fill_n(mix, table.dim, 0.0f);
  for (int64_t j = 0; j < mixture.k; ++j) {
    const T* e_token = table.row(mixture.token[j]);
    norms.token[j] = norm(kernels, e_token, table.dim);
    norms.target += mixture.confidence[j] * norms.token[j];
    kernels.add_scaled(mix, e_token, mixture.confidence[j], table.dim);
  }
  kernels.add_scaled(mix, e_mask, residual, table.dim);  // also at 0: 0 * inf is NaN
  norms.mix = norm(tile_kernels<float>(), mix, table.dim);
  return norms;
}

// h, rounded once to the table's dtype; `mix` is scratch for dim floats
template <class T>
void store_hybrid(const EmbeddingTable<T>& table, const Mixture& mixture, int64_t mask_token_id,
                  float* mix, T* out) {
  const MixtureNorms norms = mix_embeddings(table, mixture, mask_token_id, mix);
  const float scale = norms.mix == 0 ? 0 : norms.target / norms.mix;
  tile_kernels<T>().store_scaled(out, mix, scale, table.dim);
}

}  // namespace dmax::cpu
