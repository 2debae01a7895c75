// The choice of instruction set, once per process.
#include "cpu/tile_kernels.h"

namespace dmax::cpu {

#define DMAX_DECLARE_ISA(isa)                          \
  namespace isa {                                      \
  extern const TileKernels<float> kFloat32Kernels;     \
  extern const TileKernels<BFloat16> kBFloat16Kernels; \
  extern const TileKernels<Float16> kFloat16Kernels;   \
  }

DMAX_DECLARE_ISA(portable)
#if defined(DMAX_HAVE_AVX2)
DMAX_DECLARE_ISA(avx2)
#endif
#if defined(DMAX_HAVE_AVX512)
DMAX_DECLARE_ISA(avx512)
#endif

namespace {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

InstructionSet detect() {
#if defined(DMAX_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::kAvx512;
  }
#endif
#if defined(DMAX_HAVE_AVX2)
  // Every CPU with AVX2 has F16C
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kPortable;
}

InstructionSet chosen() {
  static const InstructionSet set = detect();
  return set;
}

template <class T>
const TileKernels<T>& select(const TileKernels<T>& portable_kernels,
                             const TileKernels<T>& avx2_kernels,
                             const TileKernels<T>& avx512_kernels) {
  switch (chosen()) {
    case InstructionSet::kAvx512:
      return avx512_kernels;
    case InstructionSet::kAvx2:
      return avx2_kernels;
    default:
      return portable_kernels;
  }
}

}  // namespace

#if defined(DMAX_HAVE_AVX512) && defined(DMAX_HAVE_AVX2)
#define DMAX_SELECT(kernels) select(portable::kernels, avx2::kernels, avx512::kernels)
#else
#define DMAX_SELECT(kernels) select(portable::kernels, portable::kernels, portable::kernels)
#endif

template <>
const TileKernels<float>& tile_kernels<float>() {
  return DMAX_SELECT(kFloat32Kernels);
}
template <>
const TileKernels<BFloat16>& tile_kernels<BFloat16>() {
  return DMAX_SELECT(kBFloat16Kernels);
}
template <>
const TileKernels<Float16>& tile_kernels<Float16>() {
  return DMAX_SELECT(kFloat16Kernels);
}

}  // namespace dmax::cpu

// For `python -m dmax_kernels info`, by ctypes: the instruction set that tile_kernels() runs
extern "C" __attribute__((visibility("default"))) const char* dmax_cpu_instruction_set() {
  switch (dmax::cpu::chosen()) {
    case dmax::cpu::InstructionSet::kAvx512:
      return "avx512";
    case dmax::cpu::InstructionSet::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}
