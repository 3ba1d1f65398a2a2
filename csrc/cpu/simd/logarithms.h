// Natural logarithms outside of the kernels, exponents of 2 inside of them.
#pragma once

#include "cpu/simd/vec.h"

namespace smattn::cpu::SMATTN_UNIT {

constexpr double kLog2e = 1.44269504088896340736, kLog2eRest = 2.0355273740931033e-17;  // their sum is log2(e) to 107 bits
constexpr double kLn2 = 0.693147180559945309417, kLn2Rest = 2.319046813846299558e-17;

// Natural logarithms to exponents of 2 and back: rounded once, so that going there and back loses nothing that matters.
inline double to_log2(double x) { return __builtin_fma(x, kLog2e, x * kLog2eRest); }
inline double to_natural(double x) { return __builtin_fma(x, kLn2, x * kLn2Rest); }

// What to subtract from the exponents of a row: lse; +inf in a dead row, so that P is 0; and NaN where a score is +inf, as any softmax is.
inline double exponent_of(double lse) {
  if (lse - lse == 0) return to_log2(lse);
  return lse < 0 ? __builtin_inf() : __builtin_nan("");
}

}  // namespace smattn::cpu::SMATTN_UNIT
