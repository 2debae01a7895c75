// The products of bfloat16_products.h for CPUs with AVX512-BF16 (AMD's from Zen 4 on).
//
// One instruction, vdpbf16ps, adds the products of two columns to each of sixteen float32 sums, at
// twice the rate of a float32 product. The lanes are rows where there are many: the rows are packed
// once, and a pair of a token's columns is broadcast from memory. Eight tokens x two panels of
// sixteen rows keep sixteen chains of sums in registers and run at the full rate of the instruction
// (232 GFLOP/s on one core of a Zen 4). With few rows, most lanes would be idle; the lanes are then
// columns, and the weight is read once and as it is stored.
//
// In both, a sum's order is fixed, so a logit's bits depend on its row and token alone. The
// instruction treats subnormal numbers as 0, a change too small to matter to a logit.
#include "cpu/simd/bfloat16_packing.h"
#include "cpu/simd/transpose.h"
#include "cpu/simd/vector_math.h"

namespace dmax::cpu::DMAX_ISA {

namespace {

constexpr int64_t kGroupTokens = kLanes;                 // tokens packed together
constexpr int64_t kPanelSums = kProductTokens * kLanes;  // sums[panel][token][row]
// Steps before the next pair of panels: 128 KiB of rows and 256 KiB of tokens stay in L2
constexpr int64_t kDepthSteps = 64;

// Holds the packed tokens, and the sums of a pair of panels
int64_t scratch_bytes(int64_t dim, int64_t /*rows*/) {
  return kProductTokens * num_steps(dim) * kStep * 2 + 2 * kPanelSums * 4;
}

// Tokens and columns of the weight that add_products() packs before it multiplies them
struct Unpacked {
  MatrixView<BFloat16> weight;
  int64_t tokens;  // with fewer than those multiplied, zeros follow
  int64_t dim;     // columns left, the same

  Unpacked skip(int64_t some_tokens, int64_t columns) const {
    const BFloat16* data =
        weight.data + some_tokens * weight.row_stride + columns * weight.column_stride;
    return {{data, weight.row_stride, weight.column_stride}, tokens - some_tokens, dim - columns};
  }
};

template <int kTokens>
DMAX_INLINE void pack_step(const Unpacked& from, int64_t step, BFloat16* out) {
  const MatrixView<BFloat16>& weight = from.weight;
  const int64_t begin = step * kStep;
  const BFloat16* x = weight.data + begin * weight.column_stride;
  for (int t = 0; t < kTokens; ++t) {
    const bool used = t < from.tokens;
    pack_line(x + (used ? t : 0) * weight.row_stride, weight.column_stride,
              used ? from.dim - begin : 0, out + t * kStep);
    // Into L2, for the next call
    __builtin_prefetch(x + (kProductTokens + t) * weight.row_stride, 0, 2);
  }
}

// Adds `steps` steps of kTokens tokens x kPanels panels to the sums. With kPacks, a step's tokens
// are packed while the step before is multiplied.
template <int kTokens, int kPanels, bool kPacks>
DMAX_INLINE void add_products(const Unpacked& from, BFloat16* tokens, const BFloat16* rows,
                              int64_t steps, float* sums) {
  __m512 sum[kTokens][kPanels];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      sum[t][p] = _mm512_loadu_ps(sums + p * kPanelSums + t * kLanes);
    }
  }
  if (kPacks) pack_step<kTokens>(from, 0, tokens);
  for (int64_t step = 0; step < steps; ++step) {
    if (kPacks && step + 1 < steps) {
      pack_step<kTokens>(from, step + 1, tokens + kGroupTokens * kStep);
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < kStep / 2; ++pair) {
      __m512bh row[kPanels];
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        row[p] = (__m512bh)_mm512_load_si512(rows + p * kTileElements + pair * kStep);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        int32_t columns;
        __builtin_memcpy(&columns, tokens + t * kStep + pair * 2, sizeof(columns));
        const __m512bh token = (__m512bh)_mm512_set1_epi32(columns);
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) sum[t][p] = _mm512_dpbf16_ps(sum[t][p], token, row[p]);
      }
    }
    tokens += kGroupTokens * kStep;
    rows += 2 * kTileElements;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      _mm512_storeu_ps(sums + p * kPanelSums + t * kLanes, sum[t][p]);
    }
  }
}

template <bool kPacks>
void add_group(const Unpacked& from, BFloat16* tokens, const BFloat16* rows, int64_t steps,
               bool one_panel, float* sums) {
  constexpr int kHalf = kGroupTokens / 2;
  if (one_panel) {
    add_products<kGroupTokens, 1, kPacks>(from, tokens, rows, steps, sums);
  } else {
    add_products<kHalf, 2, kPacks>(from, tokens, rows, steps, sums);
    add_products<kHalf, 2, kPacks>(from.skip(kHalf, 0), tokens + kHalf * kStep, rows, steps,
                                   sums + kHalf * kLanes);
  }
}

// ---- Few rows: packed[step][row][column] ----

// The most rows for which this is faster: on one thread of a Zen 4, with 9 and 12 rows, it took
// 0.86 of the time of the other way, and with 16 1.2 times as long
constexpr int64_t kFewRows = 12;

void pack_few_rows(MatrixView<BFloat16> hidden, int64_t rows, int64_t dim, BFloat16* out) {
  for (int64_t step = 0; step < num_steps(dim); ++step) {
    for (int64_t row = 0; row < rows; ++row, out += kStep) {
      const BFloat16* x = hidden.row(row) + step * kStep * hidden.column_stride;
      pack_line(x, hidden.column_stride, dim - step * kStep, out);
    }
  }
}

// The products of kTokens tokens and of kRows of the packed rows
template <int kTokens, int kRows>
DMAX_INLINE void few_products(const BFloat16* const* tokens, int64_t steps, const BFloat16* rows,
                              int64_t num_rows, VecF (*sums)[kRows]) {
  __m512 sum[kTokens][kRows];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) sum[t][row] = _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < steps; ++step, rows += num_rows * kStep) {
    __m512bh values[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      values[row] = (__m512bh)_mm512_load_si512(rows + row * kStep);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m512bh token = (__m512bh)_mm512_loadu_si512(tokens[t] + step * kStep);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        sum[t][row] = _mm512_dpbf16_ps(sum[t][row], token, values[row]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) sums[t][row].part[0] = (VecF::Native)sum[t][row];
  }
}

// kRows rows from `row` on, for all tokens; at least eight chains of sums
template <int kRows>
void multiply_few(MatrixView<BFloat16> weight, int64_t tokens, int64_t dim, const BFloat16* packed,
                  int64_t row, int64_t num_rows, BFloat16* scratch, float* logits,
                  int64_t logits_stride) {
  constexpr int kTokens = kRows == 1 ? 8 : 4;
  const int64_t steps = num_steps(dim);
  const bool in_place = weight.column_stride == 1 && dim % kStep == 0;
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const int64_t count = tokens - t < kTokens ? tokens - t : kTokens;
    const BFloat16* token[kTokens];
    for (int64_t j = 0; j < kTokens; ++j) {
      token[j] = weight.row(j < count ? t + j : t);
      if (in_place) continue;
      BFloat16* copy = scratch + j * steps * kStep;
      for (int64_t step = 0; step < steps; ++step) {
        pack_line(token[j] + step * kStep * weight.column_stride, weight.column_stride,
                  dim - step * kStep, copy + step * kStep);
      }
      token[j] = copy;
    }
    VecF sums[kTokens][kRows];
    few_products<kTokens, kRows>(token, steps, packed + row * kStep, num_rows, sums);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < count; ++j) {
        logits[(row + i) * logits_stride + t + j] = reduce_add(sums[j][i]);
      }
    }
  }
}

// ---- The table ----

int64_t packed_bytes_of(int64_t rows, int64_t dim) {
  return rows <= kFewRows ? rows * num_steps(dim) * kStep * 2 : packed_bytes(rows, dim);
}

void pack_rows_of(MatrixView<BFloat16> hidden, int64_t rows, int64_t dim, void* packed) {
  if (rows <= kFewRows) {
    pack_few_rows(hidden, rows, dim, static_cast<BFloat16*>(packed));
  } else {
    pack_rows(hidden, rows, dim, packed);
  }
}

void multiply_many(MatrixView<BFloat16> weight, int64_t tokens, int64_t dim, const void* packed,
                   int64_t rows, void* scratch, float* logits, int64_t logits_stride) {
  const BFloat16* packed_rows = static_cast<const BFloat16*>(packed);
  BFloat16* packed_tokens = static_cast<BFloat16*>(scratch);
  const int64_t steps = num_steps(dim);
  float* sums = reinterpret_cast<float*>(packed_tokens + kProductTokens * steps * kStep);
  for (int64_t first_row = 0; first_row < rows; first_row += kPairRows) {
    __builtin_memset(sums, 0, 2 * kPanelSums * sizeof(float));
    for (int64_t begin = 0; begin < steps; begin += kDepthSteps) {
      const int64_t depth = steps - begin < kDepthSteps ? steps - begin : kDepthSteps;
      const BFloat16* row_tiles =
          packed_rows + (first_row / kLanes * steps + begin * 2) * kTileElements;
      for (int64_t t = 0; t < tokens; t += kGroupTokens) {
        const Unpacked from = Unpacked{weight, tokens, dim}.skip(t, begin * kStep);
        BFloat16* group = packed_tokens + (t / kGroupTokens * steps + begin) * kTileElements;
        (first_row == 0 ? add_group<true> : add_group<false>)(from, group, row_tiles, depth,
                                                              rows - first_row <= kLanes,
                                                              sums + t * kLanes);
      }
    }
    for (int64_t panel = 0; panel < 2; ++panel) {
      const int64_t row = first_row + panel * kLanes;
      for (int64_t t = 0; t < tokens && row < rows; t += kLanes) {
        store_transposed(sums + panel * kPanelSums + t * kLanes, rows - row, tokens - t,
                         logits + row * logits_stride + t, logits_stride);
      }
    }
  }
}

void multiply(MatrixView<BFloat16> weight, int64_t tokens, int64_t dim, const void* packed,
              int64_t rows, void* scratch, float* logits, int64_t logits_stride) {
  if (rows > kFewRows) {
    return multiply_many(weight, tokens, dim, packed, rows, scratch, logits, logits_stride);
  }
  constexpr decltype(&multiply_few<1>) kWays[] = {multiply_few<1>, multiply_few<2>, multiply_few<3>,
                                                  multiply_few<4>};
  for (int64_t row = 0; row < rows; row += 4) {
    const int64_t count = rows - row < 4 ? rows - row : 4;
    kWays[count - 1](weight, tokens, dim, static_cast<const BFloat16*>(packed), row, rows,
                     static_cast<BFloat16*>(scratch), logits, logits_stride);
  }
}

}  // namespace

extern const BFloat16Products kProducts = {1, packed_bytes_of, scratch_bytes, pack_rows_of,
                                           multiply};

}  // namespace dmax::cpu::DMAX_ISA
