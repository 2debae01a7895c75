// The loops over adjacent elements, in the best instruction set that the CPU has.
//
// Row kernels (csrc/cpu/<family>.cpp) cut the vocabulary into tiles of kTile elements and call
// these; the table is looked up once per op call. All arithmetic is float32.
#pragma once

#include <cstdint>

#include "common/element_types.h"

namespace dmax::cpu {

// Independent of the number of threads and rows, so that a row's bits do not depend on them.
// 2,048 elements are 8 KiB of float32: a tile stays in L1 between two loops over it.
constexpr int64_t kTile = 2048;

// Rows that add_mixed adds at once: eight products for each load and store of a sum
constexpr int kMixed = 8;

// exp(-30), from which on 262,144 tokens add less than 3e-8 in all
constexpr float kNegligibleBits = 43.28f;

// Sums over w = 2^t with t = (x - maximum) * scale
struct EntropySums {
  float weight;    // sum of w, the same bits as sum_exp
  float exponent;  // sum of t * w, which is 0 where w is
};

template <class T>
struct TileKernels {
  // One element as float32
  float (*value)(const T* x);
  // Largest of x[0, n): NaN if any is NaN, -inf if n is 0
  float (*maximum)(const T* x, int64_t n);
  // Index of the first element equal to `value` (of the first NaN if value is NaN); n if none
  int64_t (*find)(const T* x, int64_t n, float value);
  // Index of the first element that is NaN or above `threshold`; n if none
  int64_t (*find_above)(const T* x, int64_t n, float threshold);
  // Sum of 2^((x - maximum) * scale)
  float (*sum_exp)(const T* x, int64_t n, float maximum, float scale);
  // The same, and the other sum that the entropy needs
  EntropySums (*entropy_sums)(const T* x, int64_t n, float maximum, float scale);
  // How many elements are NaN or above `threshold`, or, unless `exceed`, equal to it
  int64_t (*count_before)(const T* x, int64_t n, float threshold, bool exceed);
  // y = 2^((x - maximum) * scale), and 0 where that is below 2^-kNegligibleBits
  void (*weigh)(const T* x, float* y, int64_t n, float maximum, float scale);
  // Sum of x - shift; subtracting before adding keeps a common offset from costing precision
  double (*sum)(const T* x, int64_t n, float shift);
  // y = factor * 2^((x - maximum) * scale) + shift; y may be x
  void (*softmax_grad)(const T* x, T* y, int64_t n, float maximum, float scale, float factor,
                       float shift);
  // x = softcap * tanh(x / softcap) unless softcap is 0 or x infinite; then, unless bias is null,
  // x += bias
  void (*softcap_and_bias)(T* x, int64_t n, float softcap, const float* bias);
  // Sum of a * b
  double (*dot)(const T* a, const T* b, int64_t n);
  // sum += factor * x
  void (*add_scaled)(float* sum, const T* x, float factor, int64_t n);
  // sum += factors[t] * x[t] for kMixed rows x[t], one after the other
  void (*add_mixed)(float* sum, const T* const* x, const float* factors, int64_t n);
  // y = factor * x, rounded once to T
  void (*store_scaled)(T* y, const float* x, float factor, int64_t n);
  // y = x, exactly
  void (*widen)(float* y, const T* x, int64_t n);
  // values[i] = x[places[i]], exactly, and x[places[i]] = values[i], rounded to T
  void (*gather)(const T* x, const int64_t* places, float* values, int64_t n);
  void (*scatter)(T* x, const int64_t* places, const float* values, int64_t n);
  // products[i * stride + t] = a_i . x_t. The num_rows float32 rows of a lie `dim` elements apart,
  // the tokens x_stride elements.
  void (*row_products)(const T* x, int64_t x_stride, int64_t tokens, const float* a,
                       int64_t num_rows, int64_t dim, float* products, int64_t stride);
};

template <class T>
const TileKernels<T>& tile_kernels();

}  // namespace dmax::cpu
