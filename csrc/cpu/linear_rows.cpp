// linear_top1_confidence, linear_sample_tokens and linear_token_logprobs: what logits say of their
// rows, from the hidden states.
#include "cpu/cross_entropy.h"
#include "cpu/linear_stream.h"
#include "cpu/logprob_rows.h"
#include "cpu/row_stats.h"
#include "cpu/sample_results.h"

namespace dmax::cpu {

namespace {

// What the tokens that were seen give: the draw from them, and the sum of their exponentials
struct StreamedDraw {
  float maximum = -std::numeric_limits<float>::infinity();  // NaN if any logit is NaN
  double total = 0;        // sum of exp((x - maximum) / temperature)
  int64_t top_token = 0;   // the first one that has the maximum
  double temperature = 1;  // of the softmax
  PerturbedBest best{-std::numeric_limits<float>::infinity(), -1};  // the best draw tile
  int64_t token = 0;                                                // drawn within it
  float logit = 0;

  // The logits x of the next tokens, first_id .. first_id + n, where first_id begins a draw tile
  void add(const float* x, int64_t n, int64_t first_id, const DrawOptions& options,
           const NoiseKey& key) {
    if (std::isnan(maximum)) return;  // the first NaN has been found
    if (!options.greedy()) temperature = options.temperature;
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float maxima[kLinearTokens / kDrawTile], masses[kLinearTokens / kDrawTile];
    const float largest = draw_kernels<float>().maxima(x, n, maxima);
    if (largest > maximum || std::isnan(largest)) {
      rescale(largest);
      top_token = first_id + tile_kernels<float>().find(x, n, largest);
    }
    if (!std::isfinite(maximum) ||
        !((static_cast<double>(maximum) - largest) / temperature < kNegligibleDepth)) {
      return;  // nor is it drawn (row_draw.h)
    }
    const float scale = softmax_scale(temperature);
    const int64_t tiles = num_draw_tiles(n);
    const RaceKernels& kernels = race_kernels();
    draw_kernels<float>().masses(x, n, maxima, scale, masses);
    total += kernels.total_mass(maxima, masses, tiles, maximum, scale);
    if (options.greedy()) return;

    const float t = static_cast<float>(temperature);
    float scores[kLinearTokens / kDrawTile];
    kernels.log_masses(maxima, masses, tiles, t, scores);
    const int64_t first = int64_t{kTileCounters} + first_id / kDrawTile;
    const PerturbedBest before = best;
    best = kernels.race(scores, tiles, first, key, 1.0f, best);
    if (best.id == before.id) return;
    const int64_t begin = (best.id - first) * kDrawTile;
    const int64_t end = std::min<int64_t>(begin + kDrawTile, n);
    token =
        kernels.race(x + begin, end - begin, first_id + begin, key, t, {-kInfinity, first_id + end})
            .id;
    logit = x[token - first_id];
  }

  // Adds what later tokens of the same row gave
  void merge(const StreamedDraw& later) {
    if (std::isnan(maximum)) return;
    if (later.maximum > maximum || std::isnan(later.maximum)) {
      rescale(later.maximum);
      top_token = later.top_token;
    }
    if (std::isfinite(later.maximum)) {
      total += later.total * std::exp((static_cast<double>(later.maximum) - maximum) / temperature);
    }
    if (later.best.score > best.score) {  // a tie stays with the lower tile
      best = later.best;
      token = later.token;
      logit = later.logit;
    }
  }

  double weight() const { return std::exp((static_cast<double>(logit) - maximum) / temperature); }

 private:
  // Raises the maximum, which the total is relative to
  void rescale(float to) {
    if (std::isfinite(maximum)) {
      total *= std::exp((static_cast<double>(maximum) - to) / temperature);
    }
    maximum = to;
  }
};

// A draw tile that does not beat an earlier group's best one is lost when they are merged: none
// need be drawn from before
inline void follow(StreamedDraw& state, const StreamedDraw& earlier) {
  state.best.score = earlier.best.score;
}

// Where a row is read more than once, its logits are stored: of as many rows at a time as fit into
// this memory
constexpr int64_t kStoredLogits = int64_t{64} << 20;  // bytes

struct NoState {};

// Makes the logits x of the tokens first_id .. first_id + n, where first_id is a multiple of 32,
// -inf where the mask does not allow them
void hide_tokens(const uint32_t* words, int64_t first_id, float* x, int64_t n) {
  if (words) draw_kernels<float>().widen_allowed(x, x, n, words + first_id / 32);
}

// Calls f(first, count, logits) for spans of rows with their logits [count, V]
template <class F>
void for_stored_rows(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                     int64_t suppress_token, const F& f) {
  const int64_t vocab = weight.size(0);
  const Tensor all = torch::stable::reshape(hidden, {-1, hidden.size(hidden.dim() - 1)});
  const int64_t most_rows = std::min<int64_t>(
      all.size(0),
      std::max<int64_t>(1, kStoredLogits / (vocab * static_cast<int64_t>(sizeof(float)))));
  const std::unique_ptr<float[]> logits(new float[most_rows * vocab]);
  for (int64_t first = 0; first < all.size(0); first += most_rows) {
    const int64_t count = std::min(most_rows, all.size(0) - first);
    Tensor rows = all;  // narrow() takes one that it may write
    reduce_linear_rows<NoState>(
        torch::stable::narrow(rows, 0, first, count), weight, bias, suppress_token,
        [&](int64_t row, NoState&, const TileKernels<float>&, const float* x, int64_t n,
            int64_t first_id) { std::copy_n(x, n, logits.get() + row * vocab + first_id); },
        [](NoState&, const NoState&) {}, [](int64_t, const NoState&) {});
    f(first, count, static_cast<const float*>(logits.get()));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> linear_top1_confidence(Tensor hidden, Tensor weight, OptionalTensor bias,
                                                  double temperature, int64_t suppress_token,
                                                  OptionalTensor allowed) {
  check_linear_top1_confidence(hidden, weight, bias, temperature, suppress_token, allowed);
  Tensor token = empty_like_device(hidden, leading_sizes(hidden), ScalarType::Long);
  Tensor confidence = empty_like_device(hidden, leading_sizes(hidden), ScalarType::Float);
  if (token.numel() == 0) return {token, confidence};
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();
  const AllowedMask mask(allowed, weight.size(0));
  reduce_linear_rows<RowStats>(
      hidden, weight, bias, suppress_token,
      [&](int64_t row, RowStats& stats, const TileKernels<float>& kernels, float* x, int64_t n,
          int64_t first_id) {
        hide_tokens(mask.row(row), first_id, x, n);
        stats.add(kernels, x, n, first_id, temperature);
      },
      [&](RowStats& stats, const RowStats& later) { stats.merge(later, temperature); },
      [&](int64_t row, const RowStats& stats) {
        token_out[row] = stats.token;
        confidence_out[row] = stats.confidence();
      });
  return {token, confidence};
}

SampleTensors linear_sample_tokens(Tensor hidden, Tensor weight, Tensor seed, OptionalTensor bias,
                                   double temperature, int64_t top_k, double top_p, double min_p,
                                   OptionalTensor row_options, int64_t suppress_token,
                                   OptionalTensor allowed) {
  const int64_t vocab =
      check_linear_sample_tokens(hidden, weight, seed, bias, temperature, top_k, top_p, min_p,
                                 row_options, suppress_token, allowed)
          .vocab;
  const SampleResults results(hidden);
  const int64_t num_rows = hidden.numel() / hidden.size(hidden.dim() - 1);
  if (num_rows == 0) return results.tensors();
  const DrawArguments arguments(seed, {temperature, static_cast<double>(top_k), top_p, min_p},
                                row_options, allowed, vocab);
  if (arguments.any_filters(num_rows, vocab)) {
    for_stored_rows(hidden, weight, bias, suppress_token,
                    [&](int64_t first, int64_t count, const float* logits) {
                      sample_rows<float>(count, arguments, results, first, vocab, [&](int64_t i) {
                        return VisibleRow<float>{logits + i * vocab, vocab, -1,
                                                 arguments.allowed(first + i)};
                      });
                    });
    return results.tensors();
  }
  reduce_linear_rows<StreamedDraw>(
      hidden, weight, bias, suppress_token,
      [&](int64_t row, StreamedDraw& draw, const TileKernels<float>&, float* x, int64_t n,
          int64_t first_id) {
        hide_tokens(arguments.allowed(row), first_id, x, n);
        draw.add(x, n, first_id, arguments.options(row), arguments.key(row));
      },
      [](StreamedDraw& draw, const StreamedDraw& later) { draw.merge(later); },
      [&](int64_t row, const StreamedDraw& draw) {
        if (!std::isfinite(draw.maximum)) return results.store_undefined(row, draw.top_token);
        if (arguments.options(row).greedy()) {
          return results.store_greedy(row, draw.top_token, draw.total);
        }
        results.store(row, draw.token, draw.weight(), draw.total, draw.total);
      });
  return results.tensors();
}

LogprobTensors linear_token_logprobs(Tensor hidden, Tensor weight, Tensor ids, OptionalTensor bias,
                                     double temperature, int64_t top_n, int64_t ignore_index,
                                     OptionalTensor allowed) {
  const auto [vocab, per_row] = check_linear_token_logprobs(hidden, weight, ids, bias, temperature,
                                                            top_n, ignore_index, allowed);
  const Tensor tokens = checked_targets("linear_token_logprobs", ids, vocab, ignore_index, "ids");
  const LogprobRows rows(hidden, ids, tokens, per_row, {vocab, -1, temperature}, top_n,
                         ignore_index);
  const AllowedMask mask(allowed, vocab);
  const auto report = [&, vocab = vocab](int64_t first, int64_t count, const float* logits) {
    rows.report<float>(first, count, [&](int64_t i) {
      return ScannedRow<float>(logits + i * vocab, mask.row(first + i));
    });
  };
  if (hidden.numel() > 0) for_stored_rows(hidden, weight, bias, -1, report);
  return rows.tensors();
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("linear_top1_confidence", TORCH_BOX(&dmax::cpu::linear_top1_confidence));
  m.impl("linear_sample_tokens", TORCH_BOX(&dmax::cpu::linear_sample_tokens));
  m.impl("linear_token_logprobs", TORCH_BOX(&dmax::cpu::linear_token_logprobs));
}
