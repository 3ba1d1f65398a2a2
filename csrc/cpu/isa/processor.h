// What is known of the processor at hand beyond the instructions that it has.
#pragma once

#include <string>

namespace smattn::cpu {

struct Processor {
  std::string vendor;  // as cpuid says it: "GenuineIntel", "AuthenticAMD"
  int family = 0, model = 0;
};

Processor processor();  // empty where there is no cpuid

// Whether its bfloat16 dot product is slower than the float multiplications that it replaces. It is a table and not a measurement, because
// the ranks of one job must choose alike and bits must repeat.
bool has_slow_bfloat16_dot(const Processor& p);

// Whether it converts float16 (F16C), which __builtin_cpu_supports cannot be asked by every compiler that builds this.
bool has_half_conversions();

// Whether it has matrix tiles and products of bfloat16 in them.
bool has_tiles();
// Asks the system to let this process use them: true, or why not in `reason`. Children of the process may, then.
bool may_use_tiles(std::string& reason);

}  // namespace smattn::cpu
