// The products of product_kernels.h in float32 vectors; compiled once per instruction set
// (DMAX_ISA).
#include "cpu/product_kernels.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace dmax::cpu::DMAX_ISA {

namespace {

// Part of D that one pass over the weights takes: with two panels of hidden rows, 40 KiB of L1.
// Weights go through scratch memory: 16-bit ones widened, and rows of a power-of-two stride would
// evict one another from L1.
constexpr int64_t kDepth = 256;
constexpr int64_t kDepthStride = kDepth + kLanes;

// One call of the inner loop keeps kTileTokens x panels sums in registers
#if defined(__AVX512F__)
constexpr int kTileTokens = 8;
constexpr int kTilePanels = 2;  // a panel is sixteen rows
#else
constexpr int kTileTokens = 4;
constexpr int kTilePanels = 1;
#endif

int64_t num_panels(int64_t rows) { return (rows + kLanes - 1) / kLanes; }

int64_t packed_bytes(int64_t rows, int64_t dim) {
  return num_panels(rows) * dim * kLanes * static_cast<int64_t>(sizeof(float));
}

int64_t scratch_bytes(int64_t, int64_t rows) {
  return (kProductTokens * kDepthStride + num_panels(rows) * kProductTokens * kLanes) *
         static_cast<int64_t>(sizeof(float));
}

template <class T>
DMAX_INLINE void widen(const T* x, int64_t step, int64_t n, float* y) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  }
  for (; i < n; ++i) y[i] = load_one(x + i * step);
}

// packed[panel][k][row of the panel]
template <class T>
void pack_rows(MatrixView<T> hidden, int64_t rows, int64_t dim, void* packed) {
  float* out = static_cast<float*>(packed);
  for (int64_t panel = 0; panel < num_panels(rows); ++panel) {
    for (int64_t begin = 0; begin < dim; begin += kLanes) {
      const int64_t n = dim - begin < kLanes ? dim - begin : kLanes;
      VecF block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = panel * kLanes + i;
        float values[kLanes] = {};
        if (row < rows) {
          widen(hidden.row(row) + begin * hidden.column_stride, hidden.column_stride, n, values);
        }
        block[i] = load(values);
      }
      transpose(block);
      for (int64_t k = 0; k < n; ++k) store(out + (panel * dim + begin + k) * kLanes, block[k]);
    }
  }
}

// sums[panel][token][row] (+)= the products over `depth` columns. Meanwhile the same part of `next`
// comes into L2: else reading the weight and multiplying would take turns. A prefetch never faults,
// so that `next` may lie past the end.
template <int kPanels, class T>
DMAX_INLINE void multiply_tile(const float* weight, const float* rows, int64_t panel_stride,
                               int64_t depth, float* sums, bool first, const MatrixView<T>* next) {
  constexpr int64_t kPanelSums = kProductTokens * kLanes;
  VecF sum[kPanels][kTileTokens];
  for (int p = 0; p < kPanels; ++p) {
    for (int t = 0; t < kTileTokens; ++t) {
      sum[p][t] = first ? splat(0.0f) : load(sums + p * kPanelSums + t * kLanes);
    }
  }
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t begin = 0; begin < depth; begin += kLine) {
    const int64_t end = depth - begin < kLine ? depth : begin + kLine;
    if (next) {
      for (int t = 0; t < kTileTokens; ++t) __builtin_prefetch(next->row(t) + begin, 0, 2);
    }
    for (int64_t k = begin; k < end; ++k) {
      VecF row[kPanels];
      for (int p = 0; p < kPanels; ++p) row[p] = load(rows + p * panel_stride + k * kLanes);
      for (int t = 0; t < kTileTokens; ++t) {
        const VecF w = splat(weight[t * kDepthStride + k]);
        for (int p = 0; p < kPanels; ++p) sum[p][t] = sum[p][t] + row[p] * w;
      }
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    for (int t = 0; t < kTileTokens; ++t) store(sums + p * kPanelSums + t * kLanes, sum[p][t]);
  }
}

template <class T>
void multiply(MatrixView<T> weight, int64_t tokens, int64_t dim, const void* packed, int64_t rows,
              void* scratch, float* logits, int64_t logits_stride) {
  const float* packed_rows = static_cast<const float*>(packed);
  float* wide = static_cast<float*>(scratch);
  float* sums = wide + kProductTokens * kDepthStride;
  const int64_t panels = num_panels(rows);
  for (int64_t begin = 0; begin < dim; begin += kDepth) {
    const int64_t depth = dim - begin < kDepth ? dim - begin : kDepth;
    for (int64_t t = 0; t < tokens; ++t) {
      widen(weight.row(t) + begin * weight.column_stride, weight.column_stride, depth,
            wide + t * kDepthStride);
    }
    const bool last = begin + depth == dim;
    for (int64_t panel = 0; panel < panels; panel += kTilePanels) {
      const float* first_row = packed_rows + (panel * dim + begin) * kLanes;
      for (int64_t t = 0; t < tokens; t += kTileTokens) {  // past the last: whatever is there
        const float* w = wide + t * kDepthStride;
        float* out = sums + (panel * kProductTokens + t) * kLanes;
        const T* next_tokens = last ? weight.row(kProductTokens + t)
                                    : weight.row(t) + (begin + depth) * weight.column_stride;
        const MatrixView<T> next{next_tokens, weight.row_stride, 1};
        const MatrixView<T>* ahead = panel == 0 ? &next : nullptr;
        if (panel + kTilePanels <= panels) {
          multiply_tile<kTilePanels>(w, first_row, dim * kLanes, depth, out, begin == 0, ahead);
        } else {
          multiply_tile<1>(w, first_row, dim * kLanes, depth, out, begin == 0, ahead);
        }
      }
    }
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t t = 0; t < tokens; t += kLanes) {
      store_transposed(sums + (panel * kProductTokens + t) * kLanes, rows - panel * kLanes,
                       tokens - t, logits + panel * kLanes * logits_stride + t, logits_stride);
    }
  }
}

template <class T>
constexpr ProductKernels<T> products() {
  return {packed_bytes, scratch_bytes, pack_rows<T>, multiply<T>, false};
}

}  // namespace

extern const ProductKernels<float> kFloat32Products = products<float>();
extern const ProductKernels<BFloat16> kBFloat16Products = products<BFloat16>();
extern const ProductKernels<Float16> kFloat16Products = products<Float16>();

}  // namespace dmax::cpu::DMAX_ISA
