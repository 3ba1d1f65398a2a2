// What backward reads of a row that forward left: whether it is dead, and how P is rebuilt from its scores.
#pragma once

#include "cpu/simd/logarithms.h"

namespace smattn::cpu::SMATTN_UNIT {

// Which rows are dead, by number: what forward left says so. lse is not read where there is a normalizer.
template <class T>
inline auto dead_rows(const void* lse, const void* normalizer) {
  return [lse = static_cast<const T*>(lse), normalizer = static_cast<const T*>(normalizer)](int64_t row) {
    return normalizer != nullptr ? normalizer[2 * row + 1] == T(0) : lse[row] == static_cast<T>(-__builtin_inf());
  };
}

// P of a row is factor * 2^(exponent - rest). Where there is a normalizer, rest is the row's largest score and factor is 1/l. From lse
// alone, of 16 bits, factor is 2^-whole, and whole + rest is lse in base 2. If all of lse were subtracted, the exponent would be rounded to
// lse's last place, and over many keys lse can be far larger than the scores. It is above the largest of them by log2(Nk) at most, and so
// much of it at most is whole. Where lse is so large that rounding it and the scores could make P more than 2, it is raised by what is
// beyond that; rounding may do four units in the last place.
template <class T>
struct RowExponents {
  T *rest, *factor;  // [lane]
  T *lowest, *highest;  // [lane]: a lower exponent makes no normal P, a higher one comes of rounding

  static constexpr int64_t kRows = 4;
  static RowExponents on(T* memory, int64_t lanes) { return {memory, memory + lanes, memory + 2 * lanes, memory + 3 * lanes}; }

  // Of `count` rows from number `row` on; lanes beyond them are as those of dead rows. normalizer: null where there is none.
  void read(const T* lse, const T* normalizer, int64_t row, int64_t count, int64_t lanes, int64_t Nk) const {
    normalizer != nullptr ? read_normalizer(normalizer + 2 * row, count, lanes) : read_lse(lse + row, count, lanes, Nk);
  }

 private:
  void read_normalizer(const T* normalizer, int64_t count, int64_t lanes) const {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const bool beyond = lane >= count;
      rest[lane] = beyond ? static_cast<T>(__builtin_inf()) : normalizer[2 * lane];
      factor[lane] = beyond ? T(0) : normalizer[2 * lane + 1];
      highest[lane] = T(0);
      lowest[lane] = Exp2<T>::kLowest - whole_log2(factor[lane]);
    }
  }

  // -inf, the lse of a dead row, becomes +inf, so that P is 0. +inf, that of a row with an infinite score, becomes NaN.
  void read_lse(const T* lse, int64_t count, int64_t lanes, int64_t Nk) const {
    typedef int64_t Bits64 __attribute__((vector_size(kVectorBytes)));
    constexpr double kRound = Exp2<double>::kRound, kEpsilon = sizeof(T) == sizeof(double) ? 0x1p-52 : 0x1p-23;
    const double most = 64 - __builtin_clzll(static_cast<uint64_t>(Nk));
    for (int64_t lane = 0; lane < lanes; lane += kLanes<double>) {
      T numbers[kLanes<double>];
      for (int64_t i = 0; i < kLanes<double>; ++i) numbers[i] = lane + i < count ? lse[lane + i] : static_cast<T>(-__builtin_inf());
      const Vec<double> given = load_doubles(numbers), rounding = (given < 0.0 ? -given : given) * (4 * kEpsilon);
      const Vec<double> x = rounding > 1.0 ? given + (rounding - 1.0) : given, nearest = (x * kLog2e + kRound) - kRound;
      const Vec<double> bounded = nearest < most ? nearest : broadcast(most), whole = bounded > 0.0 ? bounded : Vec<double>{};
      const Vec<double> less = ((x - whole * kLn2High) - whole * kLn2Low) * kLog2e;
      const Vec<double> not_finite = given < 0.0 ? broadcast(__builtin_inf()) : broadcast(__builtin_nan(""));
      const Bits64 exponent = (Bits64)(broadcast(kRound) - whole) - (Bits64)broadcast(kRound) + Exp2<double>::kBias;
      store_doubles(rest + lane, given - given == 0.0 ? less : not_finite);
      store_doubles(factor + lane, (Vec<double>)(exponent << Exp2<double>::kMantissa));
      store_doubles(lowest + lane, static_cast<double>(Exp2<T>::kLowest) + whole);
      store_doubles(highest + lane, whole + 1.0);
    }
  }
};

}  // namespace smattn::cpu::SMATTN_UNIT
