// 16-bit floats as their bits: the CPU kernels convert to float32 before any arithmetic.
#pragma once

#include <cstdint>

namespace dmax {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace dmax
