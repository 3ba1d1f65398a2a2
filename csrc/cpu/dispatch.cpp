#include "cpu/dispatch.h"

#include <cstring>

#include "cpu/isa/processor.h"

namespace smattn::cpu {

namespace baseline {  // what every processor of the kind has: SSE2, NEON
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {  // the same with bfloat16 dot products
extern const Kernels kKernels;
}
namespace amx {  // the same with matrix tiles
extern const Kernels kKernels;
void multiply_tile(bool in_software, const uint16_t* a, const uint16_t* b, float* sum);
}  // namespace amx
#endif

namespace {

#ifdef SMATTN_AMX_EMULATED
constexpr bool kTilesAreEmulated = true;
#else
constexpr bool kTilesAreEmulated = false;
#endif

struct Sets {
  std::vector<const Kernels*> fastest_first;
  std::string why_first;
};

Sets find_sets() {
  Sets found;
  std::string why = "the widest vectors that this processor has";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_half_conversions();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    found.fastest_first.push_back(&avx512::kKernels);
    if (__builtin_cpu_supports("avx512bf16")) {
      const bool slow = has_slow_bfloat16_dot(processor());
      found.fastest_first.insert(slow ? found.fastest_first.end() : found.fastest_first.begin(), &avx512bf16::kKernels);
      std::string refusal;
      why = slow ? "on this processor float products are faster than avx512bf16's" : "the processor multiplies pairs of bfloat16";
      if (kTilesAreEmulated || (has_tiles() && may_use_tiles(refusal))) {
        found.fastest_first.insert(found.fastest_first.begin(), &amx::kKernels);
        why = kTilesAreEmulated ? "matrix tiles in software, to be tested" : "the processor multiplies matrix tiles of bfloat16";
      }
      if (!refusal.empty()) why += "; " + refusal;
    }
  }
  if (avx2) found.fastest_first.push_back(&avx2::kKernels);
#endif
  found.fastest_first.push_back(&baseline::kKernels);
  found.why_first = std::string(found.fastest_first.front()->name) + ": " + why;
  return found;
}

const Sets& sets() {
  static const Sets found = find_sets();
  return found;
}

const Kernels*& current() {
  static const Kernels* kernels = available().front();
  return kernels;
}

}  // namespace

const std::vector<const Kernels*>& available() { return sets().fastest_first; }
const std::string& why_first() { return sets().why_first; }

const Kernels& selected() { return *current(); }

bool select(const char* name) {
  for (const Kernels* kernels : available()) {
    if (std::strcmp(kernels->name, name) == 0) {
      current() = kernels;
      return true;
    }
  }
  return false;
}

bool multiply_tile([[maybe_unused]] bool in_software, [[maybe_unused]] const uint16_t* a, [[maybe_unused]] const uint16_t* b,
                   [[maybe_unused]] float* sum) {
#if defined(__x86_64__)
  const auto runs = [](const Kernels& kernels) {
    for (const Kernels* each : available()) {
      if (each == &kernels) return true;
    }
    return false;
  };
  if (in_software ? runs(avx512bf16::kKernels) : runs(amx::kKernels) && !kTilesAreEmulated) {
    amx::multiply_tile(in_software, a, b, sum);
    return true;
  }
#endif
  return false;
}

}  // namespace smattn::cpu
