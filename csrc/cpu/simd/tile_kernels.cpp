// The choice of instruction set, once per process.
#include "cpu/simd/tile_kernels.h"

#include <cstdlib>
#include <string>

#if defined(DMAX_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/simd/bfloat16_products.h"
#include "cpu/simd/draw_kernels.h"

namespace dmax::cpu {

#define DMAX_DECLARE_ISA(isa)                          \
  namespace isa {                                      \
  extern const TileKernels<float> kFloat32Kernels;     \
  extern const TileKernels<BFloat16> kBFloat16Kernels; \
  extern const TileKernels<Float16> kFloat16Kernels;   \
  extern const DrawKernels<float> kFloat32Draw;        \
  extern const DrawKernels<BFloat16> kBFloat16Draw;    \
  extern const DrawKernels<Float16> kFloat16Draw;      \
  extern const RaceKernels kRace;                      \
  }

DMAX_DECLARE_ISA(portable)
#if defined(DMAX_HAVE_AVX2)
DMAX_DECLARE_ISA(avx2)
#endif
#if defined(DMAX_HAVE_AVX512)
DMAX_DECLARE_ISA(avx512)
#endif
#if defined(DMAX_HAVE_AVX512BF16)
namespace avx512bf16 {
extern const BFloat16Products kProducts;
}
#endif
#if defined(DMAX_HAVE_AMX)
namespace amx {
extern const BFloat16Products kProducts;
}
#endif

namespace {

// In ascending order. The last two are AVX-512 plus one more kernel, the bfloat16 product.
enum class InstructionSet { kPortable, kAvx2, kAvx512, kAvx512BFloat16, kAmx };

#if defined(DMAX_HAVE_AMX)
// Whether the CPU has AMX and the Linux kernel lets this process use its registers
bool have_amx() {
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kTile) == 0 || (edx & kBFloat16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// PyTorch's own variable: default, avx2 or avx512 limits its kernels and ours to that set
InstructionSet allowed() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = value ? value : "";
  if (name == "default") return InstructionSet::kPortable;
  if (name == "avx2") return InstructionSet::kAvx2;
  if (name == "avx512") return InstructionSet::kAvx512;
  return InstructionSet::kAmx;
}

InstructionSet detect() {
  [[maybe_unused]] const InstructionSet most = allowed();
#if defined(DMAX_HAVE_AVX512)
  if (most >= InstructionSet::kAvx512 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
#if defined(DMAX_HAVE_AMX)
    if (most >= InstructionSet::kAmx && have_amx()) return InstructionSet::kAmx;
#endif
#if defined(DMAX_HAVE_AVX512BF16)
    if (most >= InstructionSet::kAvx512BFloat16 && __builtin_cpu_supports("avx512bf16")) {
      return InstructionSet::kAvx512BFloat16;
    }
#endif
    return InstructionSet::kAvx512;
  }
#endif
#if defined(DMAX_HAVE_AVX2)
  // Every CPU with AVX2 has F16C
  if (most >= InstructionSet::kAvx2 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kPortable;
}

InstructionSet chosen() {
  static const InstructionSet set = detect();
  return set;
}

template <class Kernels>
const Kernels& select(const Kernels& portable_kernels, const Kernels& avx2_kernels,
                      const Kernels& avx512_kernels) {
  switch (chosen()) {
    case InstructionSet::kAmx:
    case InstructionSet::kAvx512BFloat16:
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

template <>
const DrawKernels<float>& draw_kernels<float>() {
  return DMAX_SELECT(kFloat32Draw);
}
template <>
const DrawKernels<BFloat16>& draw_kernels<BFloat16>() {
  return DMAX_SELECT(kBFloat16Draw);
}
template <>
const DrawKernels<Float16>& draw_kernels<Float16>() {
  return DMAX_SELECT(kFloat16Draw);
}
const RaceKernels& race_kernels() { return DMAX_SELECT(kRace); }

const BFloat16Products* bfloat16_products() {
#if defined(DMAX_HAVE_AMX)
  if (chosen() == InstructionSet::kAmx) return &amx::kProducts;
#endif
#if defined(DMAX_HAVE_AVX512BF16)
  if (chosen() == InstructionSet::kAvx512BFloat16) return &avx512bf16::kProducts;
#endif
  return nullptr;
}

}  // namespace dmax::cpu

// The instruction set of tile_kernels(); `python -m dmax_kernels info` calls this through ctypes
extern "C" __attribute__((visibility("default"))) const char* dmax_cpu_instruction_set() {
  switch (dmax::cpu::chosen()) {
    case dmax::cpu::InstructionSet::kAmx:
      return "avx512, amx";
    case dmax::cpu::InstructionSet::kAvx512BFloat16:
      return "avx512, bf16";
    case dmax::cpu::InstructionSet::kAvx512:
      return "avx512";
    case dmax::cpu::InstructionSet::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}
