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
#endif

namespace {

struct Levels {
  std::vector<const Kernels*> sets;  // the fastest first
  std::string why;
};

Levels levels() {
  Levels found;
  std::string why = "the widest vectors that this processor has";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    found.sets.push_back(&avx512::kKernels);
    if (__builtin_cpu_supports("avx512bf16")) {
      const bool slow = has_slow_bfloat16_dot(processor());
      found.sets.insert(slow ? found.sets.end() : found.sets.begin(), &avx512bf16::kKernels);
      why = slow ? "on this processor float products are faster than avx512bf16's" : "the processor multiplies pairs of bfloat16";
    }
  }
  if (avx2) found.sets.push_back(&avx2::kKernels);
#endif
  found.sets.push_back(&baseline::kKernels);
  found.why = std::string(found.sets.front()->name) + ": " + why;
  return found;
}

const Levels& known() {
  static const Levels found = levels();
  return found;
}

const Kernels*& current() {
  static const Kernels* kernels = available().front();
  return kernels;
}

}  // namespace

const std::vector<const Kernels*>& available() { return known().sets; }
const std::string& why_first() { return known().why; }

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
