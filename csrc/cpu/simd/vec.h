// One vector register, for whatever instruction set this unit is compiled for: the compiler's own vector types (GCC, Clang), so that
// arithmetic is written with operators, and intrinsics only where operators say too little.
//
// Every header that includes this one is compiled into several units, each with its own instruction set. What they define must not
// be merged by the linker, so it all lives in a namespace named after the unit, and uses no inline function of the standard library.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef SMATTN_UNIT
#error "a unit defines SMATTN_UNIT, its namespace, before it includes this"
#endif

namespace smattn::cpu::SMATTN_UNIT {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON, or what the compiler makes of it
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(1)));
};

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// The integers as wide as a lane.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

// Stores past the caches what is not read again soon: no line is fetched only to be overwritten. p is aligned to a vector; drain()
// comes before another thread may read.
template <class T>
inline void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}
inline void drain() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x in every lane, -0 and NaN included
}

// The larger and the smaller of two; b where either is NaN (so put the running maximum first, or a NaN that came later is lost). By name,
// for gcc 12 would make a comparison and a blend of a > b ? a : b; maskz, for it warns inside the plain form.
#if defined(__AVX512F__)
inline Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm512_maskz_max_pd(0xff, a, b); }
inline Vec<float> smaller(Vec<float> a, Vec<float> b) { return _mm512_maskz_min_ps(0xffff, a, b); }
inline Vec<double> smaller(Vec<double> a, Vec<double> b) { return _mm512_maskz_min_pd(0xff, a, b); }
#elif defined(__AVX2__)
inline Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
inline Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
inline Vec<float> smaller(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
inline Vec<double> smaller(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a, b); }
#elif defined(__SSE2__)
inline Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm_max_ps(a, b); }
inline Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm_max_pd(a, b); }
inline Vec<float> smaller(Vec<float> a, Vec<float> b) { return _mm_min_ps(a, b); }
inline Vec<double> smaller(Vec<double> a, Vec<double> b) { return _mm_min_pd(a, b); }
#else
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
#endif

// a * b + c, in one rounding where this unit's instruction set has that. The compiler fuses nothing of its own accord (-ffp-contract=off):
// it would do so in one place and not in another, and backward is to round the scores as forward did.
#if defined(__AVX512F__)
inline Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
inline Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
inline Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return vfmaq_f32(c, a, b); }
inline Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return vfmaq_f64(c, a, b); }
#else
template <class V>
inline V fused(V a, V b, V c) {
  return a * b + c;
}
#endif

// Sum of the lanes, by halves: a fixed order.
template <class T>
inline T sum_lanes(Vec<T> v) {
  T x[kLanes<T>];
  store(x, v);
  for (int n = kLanes<T> / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  }
  return x[0];
}

// Sum of a few vectors, by halves: no addition waits for more than it must.
template <class V, int N>
inline V sum_of(const V (&v)[N]) {
  V x[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = v[i];
#pragma GCC unroll 8
  for (int n = N / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  }
  return x[0];
}

// One stage of a transpose: a and b exchange lanes so that a takes the even blocks of `Stride` lanes of both, b the odd ones.
template <class T, int Stride>
[[gnu::always_inline]] inline void exchange(Vec<T>& a, Vec<T>& b) {
#if defined(__clang__)
  Vec<T> x, y;
  for (int i = 0; i < kLanes<T>; ++i) {
    x[i] = (i / Stride) % 2 != 0 ? b[i - Stride] : a[i];
    y[i] = (i / Stride) % 2 != 0 ? b[i] : a[i + Stride];
  }
  a = x, b = y;
#else
  typedef Bits<T> Index __attribute__((vector_size(kVectorBytes)));
  Index even, odd;
  for (int i = 0; i < kLanes<T>; ++i) {
    const bool second = (i / Stride) % 2 != 0;
    even[i] = second ? kLanes<T> + i - Stride : i;
    odd[i] = second ? kLanes<T> + i : i + Stride;
  }
  const Vec<T> x = __builtin_shuffle(a, b, even);
  b = __builtin_shuffle(a, b, odd);
  a = x;
#endif
}

template <class T, int Stride>
inline void transpose_stages(Vec<T> (&v)[kLanes<T>]) {
  if constexpr (Stride < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i / Stride) % 2 == 0) exchange<T, Stride>(v[i], v[i + Stride]);
    }
    transpose_stages<T, Stride * 2>(v);
  }
}

// v[i][j] becomes v[j][i].
template <class T>
inline void transpose(Vec<T> (&v)[kLanes<T>]) {
  transpose_stages<T, 1>(v);
}

template <class I>
constexpr I smaller_of(I a, I b) {
  return a < b ? a : b;
}
template <class I>
constexpr I larger_of(I a, I b) {
  return a > b ? a : b;
}
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

}  // namespace smattn::cpu::SMATTN_UNIT
