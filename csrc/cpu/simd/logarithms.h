// Natural logarithms outside of the kernels, exponents of 2 inside of them.
#pragma once

#include "cpu/simd/vec.h"

namespace smattn::cpu::SMATTN_UNIT {

constexpr double kLog2e = 1.44269504088896340736, kLog2eRest = 2.0355273740931033e-17;  // their sum is log2(e) to 107 bits
constexpr double kLn2 = 0.693147180559945309417, kLn2Rest = 2.319046813846299558e-17;

// A natural logarithm to an exponent of 2: rounded once, so that going there and back loses nothing that matters.
inline double to_log2(double x) { return __builtin_fma(x, kLog2e, x * kLog2eRest); }

// Natural logarithms of a vector of positive normal numbers, within a unit in the last place; infinity and NaN stay what they are. The method and
// the coefficients are those of FreeBSD's msun (e_log.c): x = 2^n * (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and log(1 + f) as a series in
// s = f / (2 + f).
inline Vec<double> natural_log(Vec<double> x) {
  constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;  // n * kLn2High is exact
  constexpr double kCoefficients[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                                      2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                                      6.666666666666735130e-01};
  constexpr int64_t kOne = int64_t{0x3ff00000} << 32, kSqrtHalf = int64_t{0x3fe6a09e} << 32, kMantissa = (int64_t{1} << 52) - 1;
  typedef int64_t Whole __attribute__((vector_size(kVectorBytes)));
  const Whole bits = (Whole)x + (kOne - kSqrtHalf);
  const Vec<double> n = __builtin_convertvector((bits >> 52) - 1023, Vec<double>);
  const Vec<double> f = (Vec<double>)((bits & kMantissa) + kSqrtHalf) - 1.0, s = f / (f + 2.0), z = s * s, half = 0.5 * f * f;
  Vec<double> series = broadcast(kCoefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 7; ++i) series = series * z + kCoefficients[i];
  const Vec<double> log = n * kLn2High - ((half - (s * (half + series * z) + n * kLn2Low)) - f);
  return x - x == 0.0 ? log : x;
}

// What to subtract from the exponents of a row: lse; +inf in a dead row, so that P is 0; and NaN where a score is +inf, as any softmax is.
inline double exponent_of(double lse) {
  if (lse - lse == 0) return to_log2(lse);
  return lse < 0 ? __builtin_inf() : __builtin_nan("");
}

}  // namespace smattn::cpu::SMATTN_UNIT
