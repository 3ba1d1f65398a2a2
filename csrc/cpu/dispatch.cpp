#include "cpu/dispatch.h"

#include <cstring>

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
#endif

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> sets = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::kKernels);
      found.push_back(&avx512::kKernels);
    }
    if (avx2) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&baseline::kKernels);
    return found;
  }();
  return sets;
}

namespace {
const Kernels*& current() {
  static const Kernels* kernels = available().front();
  return kernels;
}
}  // namespace

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

}  // namespace smattn::cpu
