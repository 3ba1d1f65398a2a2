// 2^x, lane by lane: x = n + f with n a whole number and |f| <= 1/2, 2^f by a polynomial, then n added to the exponent.
// The polynomials interpolate (2^f - 1) / f at the Chebyshev nodes; they are off by 1e-8 (float) and 2e-17 (double) of the result,
// so that rounding decides: within 1.1 units in the last place, 1.3 where multiplication and addition are not fused (SSE2); measured, and
// the bound derived, in tests/cpu/test_cpu_exp2.py.
// Results below 2^lowest, which is at least the smallest normal number, are 0; those above 2^highest are that, which by default is +inf;
// NaN gives NaN, -inf gives 0.
#pragma once

#include <type_traits>

#include "cpu/simd/vec.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kCoefficients[] = {
      1.545315363e-4f, 1.339086331e-3f, 9.618083015e-3f, 5.550356954e-2f, 2.402265072e-1f, 6.9314718246e-1f, 1.0f};
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits
  static constexpr int kBias = 127, kMantissa = 23;
  static constexpr float kLowest = 1 - kBias;  // 2 to a lower power is no normal number
  static constexpr float kHighest = 1 + kBias;  // 2 to this power overflows
  static constexpr float kLeast = 0x1p-126f;    // the smallest normal number
};

template <>
struct Exp2<double> {
  static constexpr double kCoefficients[] = {4.4549605981865186e-10, 7.072585949269223e-9,  1.0178062445845774e-7, 1.321544258792169e-6,
                                             1.525273382983612e-5,   1.540353044173605e-4,  1.3333558146416936e-3, 9.618129107606888e-3,
                                             5.55041086648216e-2,    2.4022650695910097e-1, 6.931471805599453e-1,  1.0};
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kBias = 1023, kMantissa = 52;
  static constexpr double kLowest = 1 - kBias, kHighest = 1 + kBias, kLeast = 0x1p-1022;
};

// The whole number below log2 |x|, as x's exponent has it.
template <class T>
inline T whole_log2(T x) {
  std::make_unsigned_t<Bits<T>> bits;
  __builtin_memcpy(&bits, &x, sizeof(T));
  return static_cast<T>(static_cast<int64_t>((bits << 1) >> (Exp2<T>::kMantissa + 1)) - Exp2<T>::kBias);
}

// So many vectors step by step together keep the multipliers busy: one alone would wait for each of its operations.
constexpr int kExpAtOnce = kRegisters / 8;

#if defined(__AVX512F__)
// vreduceps would make x - n in one step and slows the loop sixfold on a Zen 5; maskz, because gcc 12 warns inside the plain forms.
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
inline Vec<float> nearest_whole(Vec<float> x) { return _mm512_maskz_roundscale_ps(0xffff, x, kNearest); }
inline Vec<double> nearest_whole(Vec<double> x) { return _mm512_maskz_roundscale_pd(0xff, x, kNearest); }
// The lanes where x is not below `lowest`, or NaN.
inline __mmask16 in_range(Vec<float> x, Vec<float> lowest) { return _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ); }
inline __mmask8 in_range(Vec<double> x, Vec<double> lowest) { return _mm512_cmp_pd_mask(x, lowest, _CMP_NLT_UQ); }
// x * 2^n, 0 in the other lanes: a subnormal result would cost an Intel processor hundreds of cycles.
inline Vec<float> times_exp2(__mmask16 lanes, Vec<float> x, Vec<float> n) { return _mm512_maskz_scalef_ps(lanes, x, n); }
inline Vec<double> times_exp2(__mmask8 lanes, Vec<double> x, Vec<double> n) { return _mm512_maskz_scalef_pd(lanes, x, n); }

template <class T, int N>
inline void exp2_each(Vec<T> (&x)[N], Vec<T> lowest = broadcast(Exp2<T>::kLowest), Vec<T> highest = broadcast(Exp2<T>::kHighest)) {
  Vec<T> n[N], p[N];
  decltype(in_range(x[0], lowest)) normal[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = smaller(highest, x[i]);  // +inf less itself would be NaN
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) n[i] = nearest_whole(x[i]);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) normal[i] = in_range(x[i], lowest);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] -= n[i], p[i] = broadcast(Exp2<T>::kCoefficients[0]);
#pragma GCC unroll 16
  for (unsigned k = 1; k < sizeof(Exp2<T>::kCoefficients) / sizeof(T); ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = fused(p[i], x[i], broadcast(Exp2<T>::kCoefficients[k]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = times_exp2(normal[i], p[i], n[i]);
}

#if defined(__AVX512BF16__)
// x less the whole number below it.
inline Vec<float> fraction(Vec<float> x) {
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
#if defined(SMATTN_TILES)
  return _mm512_maskz_reduce_ps(0xffff, x, kDown);
#else
  x = smaller(broadcast(Exp2<float>::kHighest), x);
  return x - Vec<float>(_mm512_maskz_roundscale_ps(0xffff, x, kDown));
#endif
}

// The same of weights that products read as bfloat16, within 2.8e-7 of the result: f is x less the whole number below it, of which
// times_exp2 takes care, and the polynomial interpolates at the Chebyshev nodes of [0, 1].
template <class T, int N>
inline void exp2_of_weights(Vec<T> (&x)[N], Vec<T> lowest = broadcast(Exp2<T>::kLowest)) {
  constexpr float kCoefficients[] = {1.78837e-3f, 9.19939e-3f, 5.565705e-2f, 2.4020719e-1f, 6.9314757e-1f, 1.0f};
  Vec<float> f[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) f[i] = fraction(x[i]), p[i] = broadcast(kCoefficients[0]);
#pragma GCC unroll 16
  for (unsigned k = 1; k < sizeof(kCoefficients) / sizeof(float); ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = fused(p[i], f[i], broadcast(kCoefficients[k]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = times_exp2(in_range(x[i], lowest), p[i], x[i]);
}
#endif

template <class T>
inline Vec<T> exp2(Vec<T> x, Vec<T> lowest = broadcast(Exp2<T>::kLowest), Vec<T> highest = broadcast(Exp2<T>::kHighest)) {
  Vec<T> one[1] = {x};
  exp2_each<T, 1>(one, lowest, highest);
  return one[0];
}
#else
// 2^f for |f| <= 1/2, by Horner's rule.
template <class T>
inline Vec<T> exp2_fraction(Vec<T> f) {
  Vec<T> p = broadcast(Exp2<T>::kCoefficients[0]);
#pragma GCC unroll 16
  for (unsigned k = 1; k < sizeof(Exp2<T>::kCoefficients) / sizeof(T); ++k) p = fused(p, f, broadcast(Exp2<T>::kCoefficients[k]));
  return p;
}

template <class T>
inline Vec<T> exp2(Vec<T> unbounded, Vec<T> lowest = broadcast(Exp2<T>::kLowest), Vec<T> highest = broadcast(Exp2<T>::kHighest)) {
  using E = Exp2<T>;
  typedef std::make_unsigned_t<Bits<T>> Whole __attribute__((vector_size(kVectorBytes)));  // the sum wraps where x is NaN
  const auto too_low = unbounded < lowest;  // lanes that will be 0, whatever the steps below make of them
  const Vec<T> x = smaller(highest, unbounded);  // NaN stays NaN
  const Vec<T> shifted = x + E::kRound;
  const Vec<T> p = exp2_fraction<T>(x - (shifted - E::kRound));
  // n is in the low bits of `shifted`, the others leave. A NaN may have any bits there.
  const Whole y = (Whole)p + ((Whole)shifted << E::kMantissa);
  return (Vec<T>)((y & ~(Whole)too_low) | (Whole)(x != x));
}

template <class T, int N>
inline void exp2_each(Vec<T> (&x)[N], Vec<T> lowest = broadcast(Exp2<T>::kLowest), Vec<T> highest = broadcast(Exp2<T>::kHighest)) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = exp2<T>(x[i], lowest, highest);
}
#endif

#if !defined(__AVX512BF16__)
template <class T, int N>
inline void exp2_of_weights(Vec<T> (&x)[N], Vec<T> lowest = broadcast(Exp2<T>::kLowest)) {
  exp2_each<T, N>(x, lowest);
}
#endif

}  // namespace smattn::cpu::SMATTN_UNIT
