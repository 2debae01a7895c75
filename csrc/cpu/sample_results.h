// Arguments and results of the ops that sample a token per row, and a row's way between them.
#pragma once

#include "checks/draw.h"
#include "cpu/draw_rows.h"

namespace dmax::cpu {

using SampleTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Per row: its key, its options and its mask, out of tensors that were checked before
class DrawArguments {
 public:
  DrawArguments(const Tensor& seed, const DrawOptions& options, const OptionalTensor& row_options,
                const OptionalTensor& allowed, int64_t vocab)
      : seed_(as_contiguous(seed)),
        seed_per_row_(is_seed_per_row(seed)),
        options_(options),
        allowed_(allowed, vocab) {
    if (row_options) {
      row_options_ = as_contiguous(*row_options);
      of_rows_ = row_options_->const_data_ptr<float>();
    }
  }

  NoiseKey key(int64_t row) const {
    return noise_key(seed_.const_data_ptr<int64_t>(), seed_per_row_, row);
  }
  DrawOptions options(int64_t row) const {
    return of_rows_ ? draw_options_of(of_rows_, row) : options_;
  }
  // nullptr: every token is allowed
  const uint32_t* allowed(int64_t row) const { return allowed_.row(row); }
  bool any_filters(int64_t rows, int64_t vocab) const {
    for (int64_t row = 0; row < (of_rows_ ? rows : 1); ++row) {
      if (options(row).filters(vocab)) return true;
    }
    return false;
  }

 private:
  Tensor seed_;
  bool seed_per_row_;
  DrawOptions options_;
  OptionalTensor row_options_;  // keeps the memory
  const float* of_rows_ = nullptr;
  AllowedMask allowed_;
};

class SampleResults {
 public:
  explicit SampleResults(const Tensor& rows)
      : tensors_(make<int64_t>(rows, &token_), make<float>(rows, &probability_),
                 make<float>(rows, &top1_probability_), make<float>(rows, &relative_confidence_)) {}

  const SampleTensors& tensors() const { return tensors_; }

  // weight is exp((x_token - maximum) / temperature); kept and total are the sums of such weights
  // over the tokens kept and over all
  void store(int64_t row, int64_t id, double weight, double kept, double total) const {
    const float top1 = static_cast<float>(1 / total);
    store(row, id, static_cast<float>(weight / kept), top1,
          std::min(static_cast<float>(weight), top1));
  }
  void store_greedy(int64_t row, int64_t id, double total) const {
    const float confidence = static_cast<float>(1 / total);
    store(row, id, confidence, confidence, confidence);
  }
  void store(int64_t row, int64_t id, float p, float top1, float relative) const {
    token_[row] = id;
    probability_[row] = p;
    top1_probability_[row] = top1;
    relative_confidence_[row] = relative;
  }
  void store_undefined(int64_t row, int64_t id) const {
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    store(row, id, kNan, kNan, kNan);
  }

 private:
  template <class Value>
  static Tensor make(const Tensor& rows, Value** data) {
    constexpr bool kIds = std::is_same_v<Value, int64_t>;
    Tensor t =
        empty_like_device(rows, leading_sizes(rows), kIds ? ScalarType::Long : ScalarType::Float);
    *data = t.mutable_data_ptr<Value>();
    return t;
  }

  int64_t* token_;
  float *probability_, *top1_probability_, *relative_confidence_;
  SampleTensors tensors_;
};

// Rows `first_row` and following of the call, given by row_of(0 .. count)
template <class T, class RowOf>
void sample_rows(int64_t count, const DrawArguments& arguments, const SampleResults& results,
                 int64_t first_row, int64_t vocab, const RowOf& row_of) {
  const auto temperature_of = [&](int64_t i) {
    const DrawOptions options = arguments.options(first_row + i);
    return options.greedy() ? 1.0 : options.temperature;
  };
  draw_rows<T>(count, vocab, row_of, temperature_of,
               [&](int64_t i, const RowDraw<T>& draw, DrawScratch* scratch) {
                 const int64_t row = first_row + i;
                 if (!draw.defined()) return results.store_undefined(row, draw.first_maximum());
                 const DrawOptions options = arguments.options(row);
                 if (options.greedy()) {
                   return results.store_greedy(row, draw.first_maximum(), draw.total);
                 }
                 Cut cut;
                 double kept = draw.total;
                 if (options.filters(vocab)) {
                   cut = filter_row(draw, options, &scratch->filters);
                   kept = draw.total_mass();
                 }
                 const Drawn drawn = draw.draw(arguments.key(row), cut, 0, scratch->scores.data());
                 results.store(row, drawn.token, draw.weight(drawn.logit), kept, draw.total);
               });
}

}  // namespace dmax::cpu
