#include "cpu/isa/processor.h"

#include <cerrno>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace smattn::cpu {

Processor processor() {
  Processor p;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(0, &a, &b, &c, &d);
  for (const unsigned word : {b, d, c}) p.vendor.append(reinterpret_cast<const char*>(&word), sizeof(word));
  __get_cpuid(1, &a, &b, &c, &d);
  // The extended fields count only where the plain ones are at their end (Intel's manual, CPUID leaf 1).
  const int family = (a >> 8) & 15, model = (a >> 4) & 15;
  p.family = family == 15 ? family + static_cast<int>((a >> 20) & 255) : family;
  p.model = family == 15 || family == 6 ? model + static_cast<int>((a >> 12) & 0xf0) : model;
#endif
  return p;
}

bool has_slow_bfloat16_dot(const Processor& p) {
  struct Known {
    const char* vendor;
    int family, model;
  };
  static constexpr Known kSlow[] = {
      {"GenuineIntel", 6, 0x8f},  // Sapphire Rapids, the same core as the next
      {"GenuineIntel", 6, 0xcf},  // Emerald Rapids: vdpbf16ps every 2.3 cycles, a float vfmadd every 0.5
  };
  for (const Known& known : kSlow) {
    if (p.vendor == known.vendor && p.family == known.family && p.model == known.model) return true;
  }
  return false;
}

bool has_half_conversions() {
#if defined(__x86_64__)
  constexpr unsigned kF16c = 1u << 29;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kF16c) != 0;
#else
  return false;
#endif
}

bool has_tiles() {
#if defined(__x86_64__)
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBFloat16) != 0 && (d & kTile) != 0;
#else
  return false;
#endif
}

bool may_use_tiles([[maybe_unused]] std::string& reason) {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return true;
  reason = std::string("the system does not let this process use the processor's matrix tiles (arch_prctl: ") + std::strerror(errno) + ")";
#else
  reason = "the processor's matrix tiles are used on Linux alone";
#endif
  return false;
}

}  // namespace smattn::cpu
