#include "checks/rows.h"

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cpu/vocab_scan.h"

namespace dmax::cpu {
namespace {

// With w = exp((x - maximum) / temperature) and S the sum of w, the entropy is
// log S + sum((maximum - x) / temperature * w) / S. No term is negative, the winner's is 0, and log
// S is log1p(rest): nothing cancels, however close the top probability is to 1.
struct EntropyStats : RowStats {
  float runner_up;  // the second largest logit, -inf if there is none
  double far;       // what `rest` leaves out
  double exponent;  // sum of w * log2 w
};

struct Entropy {
  using Row = EntropyStats;
  struct Tile {
    double rest = 0, far = 0, exponent = 0;
  };

  template <class T>
  static EntropyStats start(const TileKernels<T>& kernels, const ScannedRow<T>& row,
                            const VocabScan& scan, const float* tile_maxima) {
    EntropyStats stats{find_top1(kernels, row, scan, tile_maxima),
                       -std::numeric_limits<float>::infinity(), 0, 0};
    if (!stats.defined()) return stats;
    const int64_t best_tile = stats.token / kTile;
    for (int64_t tile = 0; tile < scan.num_tiles(); ++tile) {
      if (tile != best_tile) stats.runner_up = std::max(stats.runner_up, tile_maxima[tile]);
    }
    row.visit(kernels, scan, best_tile,
              [&](const auto& of_y, const auto* y, int64_t begin, int64_t n) {
                for_each_range(begin, begin + n, scan.suppress, stats.token,
                               [&](int64_t from, int64_t to) {
                                 const float maximum = of_y.maximum(y + (from - begin), to - from);
                                 stats.runner_up = std::max(stats.runner_up, maximum);
                               });
              });
    return stats;
  }

  template <class T>
  static Tile tile(const TileKernels<T>& kernels, const ScannedRow<T>& row, const VocabScan& scan,
                   const EntropyStats& stats, float tile_max, int64_t tile) {
    // At depth d a token adds up to (1 + d) exp(-d) to the entropy. For 262,144 tokens at depth 30,
    // where `rest` may stop, that is 8e-7, possibly all of a confident row's entropy; at depth 50
    // it is 3e-15 at most.
    constexpr double kNoEntropyDepth = 50.0;
    Tile sums;
    const double depth = depth_of(tile_max, stats, scan);
    if (!(depth < kNoEntropyDepth)) return sums;
    double& weight = depth < kNegligibleDepth ? sums.rest : sums.far;
    row.visit(kernels, scan, tile, [&](const auto& of_y, const auto* y, int64_t begin, int64_t n) {
      for_each_range(begin, begin + n, scan.suppress, stats.token, [&](int64_t from, int64_t to) {
        const EntropySums part =
            of_y.entropy_sums(y + (from - begin), to - from, stats.maximum, scan.scale());
        weight += part.weight;
        sums.exponent += part.exponent;
      });
    });
    return sums;
  }

  static void add(EntropyStats* stats, const Tile& sums) {
    stats->rest += sums.rest;
    stats->far += sums.far;
    stats->exponent += sums.exponent;
  }
};

struct Results {
  float runner_up, entropy, logsumexp;
};

Results results_of(const EntropyStats& stats, double temperature) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  if (!stats.defined()) return {kNan, kNan, stats.maximum};
  const double difference = static_cast<double>(stats.runner_up) - stats.maximum;
  const double runner_up = std::exp(difference / temperature) / (1.0 + stats.rest);
  const double rest = stats.rest + stats.far;
  const double logsumexp = stats.maximum / temperature + std::log1p(rest);
  // exp2 of the tile kernels never gives less than 2^-126, even where there is no mass
  constexpr double kNoMass = 1e-30;
  const double entropy =
      rest < kNoMass ? 0 : std::log1p(rest) - 0.6931471805599453 * stats.exponent / (1.0 + rest);
  return {static_cast<float>(runner_up), static_cast<float>(entropy),
          static_cast<float>(logsumexp)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_statistics(Tensor logits, double temperature,
                                                                  OptionalTensor temperatures,
                                                                  int64_t suppress_token,
                                                                  OptionalTensor allowed) {
  const int64_t vocab =
      check_row_statistics(logits, temperature, temperatures, suppress_token, allowed);
  const AllowedMask mask(allowed, vocab);
  const Sizes out_sizes = leading_sizes(logits);
  Tensor token = empty_like_device(logits, out_sizes, ScalarType::Long);
  Tensor confidence = empty_like_device(logits, out_sizes, ScalarType::Float);
  Tensor runner_up = empty_like_device(logits, out_sizes, ScalarType::Float);
  Tensor entropy = empty_like_device(logits, out_sizes, ScalarType::Float);
  Tensor logsumexp = empty_like_device(logits, out_sizes, ScalarType::Float);
  const RowView view = row_view(logits);
  const std::vector<double> of_rows =
      temperatures_of("row_statistics", view.rows, temperature, temperatures);
  int64_t* token_out = token.mutable_data_ptr<int64_t>();
  float* confidence_out = confidence.mutable_data_ptr<float>();
  float* runner_up_out = runner_up.mutable_data_ptr<float>();
  float* entropy_out = entropy.mutable_data_ptr<float>();
  float* logsumexp_out = logsumexp.mutable_data_ptr<float>();

  dispatch_float(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* data = static_cast<const T*>(view.tensor.const_data_ptr());
    scan_rows<T, Entropy>(
        view.rows, {vocab, suppress_token, temperature, of_rows.data()},
        [&](int64_t row) { return ScannedRow<T>(data + row * view.row_stride, mask.row(row)); },
        [&](int64_t row, const EntropyStats& stats) {
          const Results results = results_of(stats, of_rows[row]);
          token_out[row] = stats.token;
          confidence_out[row] = stats.confidence();
          runner_up_out[row] = results.runner_up;
          entropy_out[row] = results.entropy;
          logsumexp_out[row] = results.logsumexp;
        });
  });
  return {token, confidence, runner_up, entropy, logsumexp};
}

}  // namespace dmax::cpu

STABLE_TORCH_LIBRARY_IMPL(dmax, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&dmax::cpu::row_statistics));
}
