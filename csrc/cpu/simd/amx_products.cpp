// The products of bfloat16_products.h for CPUs with AMX: Intel's from Sapphire Rapids on.
//
// One instruction multiplies 16 tokens x 32 columns by 32 columns x 16 rows and adds into float32.
// The first operand is the weight as it lies in memory; the hidden rows are packed in pairs of
// columns, once. AMX treats subnormal numbers as 0, a change too small to matter to a logit.
#include "cpu/simd/bfloat16_packing.h"
#include "cpu/simd/transpose.h"

namespace dmax::cpu::DMAX_ISA {

namespace {

constexpr int64_t kPairTokens = 2 * kLanes;  // tokens of one inner loop: four tiles of sums
// Steps before the next pair of panels: that part of the tokens, 32 KiB, stays in L1
constexpr int64_t kDepthSteps = 16;

// Holds the packed tokens, and four tiles of sums per pair of panels
int64_t scratch_bytes(int64_t dim, int64_t rows) {
  return (2 * num_steps(dim) + 4 * num_pairs(rows)) * kTileBytes;
}

// out[step][half][token of 16][column]: whole tiles, so that rows do not compete for a cache set
void pack_tokens(MatrixView<BFloat16> weight, int64_t tokens, int64_t dim, BFloat16* out) {
  for (int64_t t = 0; t < kPairTokens; ++t) {
    BFloat16* to = out + t * kStep;
    const int64_t columns = t < tokens ? dim : 0;  // the others are unused in the last call
    const BFloat16* x = weight.row(t < tokens ? t : 0);
    for (int64_t step = 0; step < num_steps(dim); ++step) {
      pack_line(x + step * kStep * weight.column_stride, weight.column_stride,
                columns - step * kStep, to + step * 2 * kTileElements);
    }
  }
}

// Configures all eight tiles as 16 rows of 64 bytes; the destructor clears the thread's tile state
struct TileState {
  TileState() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileState() { _tile_release(); }
};

void multiply(MatrixView<BFloat16> weight, int64_t tokens, int64_t dim, const void* packed,
              int64_t rows, void* scratch, float* logits, int64_t logits_stride) {
  const char* packed_rows = static_cast<const char*>(packed);
  const char* packed_tokens = static_cast<const char*>(scratch);
  const int64_t steps = num_steps(dim);
  float* sums = static_cast<float*>(scratch) + 2 * steps * kTileBytes / sizeof(float);
  constexpr int64_t kRowBytes = 64;
  constexpr int64_t kSums = kLanes * kLanes;
  const TileState state;
  for (int64_t t = 0; t < tokens; t += kPairTokens) {
    // Tokens are copied if several pairs of panels read them; a single pair reads tiles in place
    const bool in_place = num_pairs(rows) == 1 && weight.column_stride == 1 && dim % kStep == 0 &&
                          tokens - t >= kPairTokens;
    if (!in_place) {
      const MatrixView<BFloat16> part{weight.row(t), weight.row_stride, weight.column_stride};
      pack_tokens(part, tokens - t, dim, static_cast<BFloat16*>(scratch));
      // gcc 12 does not know that _tile_loadd reads memory
      __asm__ volatile("" ::: "memory");
    }
    const int64_t a_row_bytes = in_place ? weight.row_stride * 2 : kRowBytes;
    const int64_t a_next_half = in_place ? kLanes * a_row_bytes : kTileBytes;
    const int64_t a_next_step = in_place ? kStep * 2 : 2 * kTileBytes;
    const int64_t pairs = num_pairs(rows);
    const int64_t depth = pairs == 1 ? steps : kDepthSteps;
    for (int64_t begin = 0; begin < steps; begin += depth) {
      const int64_t end = steps - begin < depth ? steps : begin + depth;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const char* a = in_place ? reinterpret_cast<const char*>(weight.row(t)) : packed_tokens;
        a += begin * a_next_step;
        const char* b = packed_rows + (pair * steps + begin) * 2 * kTileBytes;
        float* pair_sums = sums + pair * 4 * kSums;
        if (begin == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, pair_sums, kRowBytes);
          _tile_loadd(1, pair_sums + kSums, kRowBytes);
          _tile_loadd(2, pair_sums + 2 * kSums, kRowBytes);
          _tile_loadd(3, pair_sums + 3 * kSums, kRowBytes);
        }
        for (int64_t step = begin; step < end; ++step) {
          if (pair == 0) {  // into L2 while the tiles multiply; otherwise the two alternate
            for (int64_t next = 0; next < kPairTokens; ++next) {
              __builtin_prefetch(weight.row(t + kPairTokens + next) + step * kStep, 0, 2);
            }
          }
          _tile_loadd(4, a, a_row_bytes);
          _tile_loadd(5, a + a_next_half, a_row_bytes);
          _tile_loadd(6, b, kRowBytes);
          _tile_loadd(7, b + kTileBytes, kRowBytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
          a += a_next_step;
          b += 2 * kTileBytes;
        }
        _tile_stored(0, pair_sums, kRowBytes);
        _tile_stored(1, pair_sums + kSums, kRowBytes);
        _tile_stored(2, pair_sums + 2 * kSums, kRowBytes);
        _tile_stored(3, pair_sums + 3 * kSums, kRowBytes);
        if (end < steps) continue;
        for (int64_t tile = 0; tile < 4; ++tile) {
          const int64_t row = pair * kPairRows + tile % 2 * kLanes;
          const int64_t token = t + tile / 2 * kLanes;
          if (row >= rows || token >= tokens) continue;
          store_transposed(pair_sums + tile * kSums, rows - row, tokens - token,
                           logits + row * logits_stride + token, logits_stride);
        }
      }
    }
  }
}

}  // namespace

// The dot products of row_products() served up to 8 rows when AMX was measured
extern const BFloat16Products kProducts = {9, packed_bytes, scratch_bytes, pack_rows, multiply};

}  // namespace dmax::cpu::DMAX_ISA
