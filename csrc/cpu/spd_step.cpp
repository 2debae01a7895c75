// One SPD step on the CPU: Algorithm 1, lines 4-12, row by row.
#include "checks/step.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/mixture.h"
#include "cpu/promotion.h"
#include "cpu/top_list.h"

namespace dmax::cpu {

namespace {

// This step's predictions, [B, K] and [B, K, k]
struct Predictions {
  std::vector<int64_t> token;
  std::vector<float> confidence;
  int64_t k;
  std::vector<int64_t> tokens_k;
  std::vector<float> confidences_k;

  Predictions(int64_t positions, int64_t k)
      : token(positions),
        confidence(positions),
        k(k),
        tokens_k(positions * k),
        confidences_k(positions * k) {}
};

struct StepOptions {
  Semantics semantics;
  int64_t mask_token_id;
};

// The state of one row of the batch, K positions each
struct RowState {
  const bool* editable;
  bool* masked;
  int64_t* token;
  float* confidence;
  bool* converged;
  int32_t* step;
};

// Lines 5-12 for one row; true if the embeddings of the next forward pass have to be written
bool update_row(const RowState& row, int64_t block, const int64_t* y, const float* c, float tau_dec,
                float tau_acc, const StepOptions& options) {
  const bool released = options.semantics == Semantics::kReleased;
  const bool settled = options.semantics == Semantics::kSettled;
  std::vector<char> promoted_bytes(block);
  bool* promoted = reinterpret_cast<bool*>(promoted_bytes.data());
  promote_prefix(c, row.masked, block, tau_dec, released, promoted);

  // Converged if every prediction is as before or every one is confident
  bool any_editable = false;
  bool consistent = released || *row.step >= 1;
  bool confident = true;
  for (int64_t j = 0; j < block; ++j) {
    const bool updated =
        released ? promoted[j] || (row.editable[j] && !row.masked[j]) : row.editable[j];
    // Settled: at a masked position a repeated prediction is not yet a decision
    const bool undecided = settled && row.masked[j];
    if (updated && (undecided || y[j] != row.token[j])) consistent = false;
    if (!row.editable[j]) continue;
    any_editable = true;
    if (!passes(c[j], tau_acc, released)) confident = false;
  }
  const bool converged = consistent || confident || !any_editable;

  // Tokens, confidences, masks
  for (int64_t j = 0; j < block; ++j) {
    if (row.editable[j]) row.confidence[j] = c[j];
    if (released) {
      if (promoted[j] || (row.editable[j] && !row.masked[j])) row.token[j] = y[j];
      row.masked[j] = row.editable[j] && row.token[j] == options.mask_token_id;
    } else {
      if (row.editable[j]) row.token[j] = y[j];
      // Line 13: the commit takes every position, so convergence leaves no mask behind
      row.masked[j] = row.masked[j] && !promoted[j] && !converged;
    }
  }
  *row.step += 1;
  *row.converged = converged;
  return !(released && converged && any_editable);
}

}  // namespace

void spd_step_(Tensor logits, Tensor embedding, Tensor editable, Tensor masked, Tensor token,
               Tensor confidence, Tensor converged, Tensor step, Tensor inputs_embeds,
               int64_t mask_token_id, double tau_dec, double tau_acc, int64_t semantics,
               int64_t top_k, double temperature, int64_t suppress_token, OptionalTensor thresholds,
               OptionalTensor allowed) {
  const auto sizes =
      check_spd_step_(logits, embedding, editable, masked, token, confidence, converged, step,
                      inputs_embeds, mask_token_id, tau_dec, tau_acc, semantics, top_k, temperature,
                      suppress_token, thresholds, allowed);
  const StepOptions options{static_cast<Semantics>(semantics), mask_token_id};
  const auto [batch, block, vocab, dim] = sizes;
  const bool* editable_data = editable.const_data_ptr<bool>();
  bool* masked_data = masked.mutable_data_ptr<bool>();
  int64_t* token_data = token.mutable_data_ptr<int64_t>();
  bool* converged_data = converged.mutable_data_ptr<bool>();
  OptionalTensor thresholds_c;
  if (thresholds) thresholds_c = as_contiguous(*thresholds);
  const float* taus = thresholds_c ? thresholds_c->const_data_ptr<float>() : nullptr;

  // Hard positions are looked up in the table, so their ids are checked before anything is written
  std::vector<int64_t> active;  // positions whose logits count
  std::vector<int64_t> rows;    // rows that have not converged
  for (int64_t b = 0; b < batch; ++b) {
    if (converged_data[b]) continue;
    rows.push_back(b);
    for (int64_t i = b * block; i < (b + 1) * block; ++i) {
      if (editable_data[i] || masked_data[i]) {
        active.push_back(i);
      } else {
        DMAX_CHECK(token_data[i] >= 0 && token_data[i] < vocab,
                   "spd_step_: token must be an id in "
                   "[0, ",
                   vocab, ") wherever editable is False, got ", token_data[i], " at row ", b,
                   ", position ", i - b * block);
      }
    }
  }

  Predictions predictions(batch * block, top_k);
  const RowView view = row_view(logits);
  const AllowedMask mask(allowed, vocab);
  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const VocabScan scan{sizes.vocab, suppress_token, temperature};
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    const auto row_of = [&](int64_t i) {
      return ScannedRow<T>(data + active[i] * view.row_stride, mask.row(active[i]));
    };
    scan_rows<T>(active.size(), scan, row_of, [&](int64_t i, const RowStats& stats) {
      const int64_t at = active[i];
      predictions.token[at] = stats.token;
      predictions.confidence[at] = stats.confidence();
      int64_t* tokens_k = &predictions.tokens_k[at * top_k];
      float* confidences_k = &predictions.confidences_k[at * top_k];
      if (top_k == 1) {
        *tokens_k = stats.token;
        *confidences_k = stats.confidence();
      } else {
        const TopK best = top_k_of_row(tile_kernels<T>(), row_of(i), scan, top_k);
        top_k_confidences(best, stats, scan, top_k, tokens_k, confidences_k);
      }
    });
  });

  // A row takes microseconds, which is not worth waking threads
  std::vector<int64_t> embed;  // positions whose embedding is written
  for (int64_t b : rows) {
    const int64_t at = b * block;
    const RowState row{editable_data + at, masked_data + at,
                       token_data + at,    confidence.mutable_data_ptr<float>() + at,
                       converged_data + b, step.mutable_data_ptr<int32_t>() + b};
    const float row_tau_dec = taus ? taus[2 * b] : static_cast<float>(tau_dec);
    const float row_tau_acc = taus ? taus[2 * b + 1] : static_cast<float>(tau_acc);
    if (update_row(row, block, &predictions.token[at], &predictions.confidence[at], row_tau_dec,
                   row_tau_acc, options)) {
      for (int64_t i = at; i < at + block; ++i) embed.push_back(i);
    }
  }

  const RowView table_view = row_view(embedding);
  dispatch_float(embedding.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const EmbeddingTable<T> table{static_cast<const T*>(table_view.tensor.const_data_ptr()),
                                  table_view.row_stride, sizes.dim};
    T* out = static_cast<T*>(inputs_embeds.mutable_data_ptr());
    constexpr int64_t kGrain = 16384;  // elements per thread
    parallel_for(embed.size(), kGrain / table.dim, [&](int64_t begin, int64_t end) {
      std::vector<float> mix(table.dim);
      for (int64_t e = begin; e < end; ++e) {
        const int64_t i = embed[e];
        T* h = out + i * table.dim;
        if (masked_data[i]) {
          std::copy_n(table.row(mask_token_id), table.dim, h);
        } else if (editable_data[i]) {
          const Mixture mixture{top_k, &predictions.tokens_k[i * top_k],
                                &predictions.confidences_k[i * top_k]};
          store_hybrid(table, mixture, mask_token_id, mix.data(), h);
        } else {
          std::copy_n(table.row(token_data[i]), table.dim, h);
        }
      }
    });
  });
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) { m.impl("spd_step_", TORCH_BOX(&dmax::cpu::spd_step_)); }
