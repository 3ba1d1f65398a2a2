// For brgemm.py: the micro-kernel of csrc/cpu/simd/product.h and torch's exported brgemm, which oneDNN makes at run time, on the same tiles.
// Both compute c[rows][columns] = a[rows][steps] * b[steps][columns] so many times, on one thread. columns is a whole number of vectors.
// What lies by step lies in elements: an element of bfloat16 is a pair of steps that follow each other.
#include <ATen/native/CPUBlas.h>

#if defined(__AVX512BF16__)
#define SMATTN_UNIT avx512bf16
#else
#define SMATTN_UNIT avx512
#endif
#include "cpu/simd/product.h"

using namespace smattn::cpu::SMATTN_UNIT;

// a lies as [rows][steps], or by step where it is transposed.
template <class E>
static void products(const E* a, const E* b, float* c, int64_t rows, int64_t columns, int64_t steps, bool transposed, int64_t times) {
  const auto keep = [c, columns]<int R, int N>(int64_t row, int64_t v, const Vec<float>(&sums)[R][N]) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < N; ++i) store(c + (row + r) * columns + (v + i) * kLanes<float>, sums[r][i]);
    }
  };
  const Vectors<E> vectors = {b, columns};
  for (int64_t n = 0; n < times; ++n) {
    if (transposed) {
      product(ColumnMajor<E>{a, rows}, vectors, rows, columns / kLanes<float>, steps, Prefetch{}, keep);
    } else {
      product(RowMajor<E>{a, steps}, vectors, rows, columns / kLanes<float>, steps, Prefetch{}, keep);
    }
  }
}

template <class T>
static void brgemms(const T* a, const T* b, float* c, int64_t rows, int64_t columns, int64_t steps, int64_t times) {
  constexpr bool kInPairs = sizeof(T) == 2;
  for (int64_t n = 0; n < times; ++n) at::native::cpublas::brgemm(rows, columns, steps, steps, columns, columns, false, a, b, c, kInPairs);
}

extern "C" void ours_float32(const float* a, const float* b, float* c, int64_t rows, int64_t columns, int64_t steps, bool transposed,
                             int64_t times) {
  products(a, b, c, rows, columns, steps, transposed, times);
}

extern "C" void brgemm_float32(const float* a, const float* b, float* c, int64_t rows, int64_t columns, int64_t steps, int64_t times) {
  brgemms(a, b, c, rows, columns, steps, times);
}

#if defined(__AVX512BF16__)
extern "C" void ours_bfloat16(const BFloat16Pair* a, const BFloat16Pair* b, float* c, int64_t rows, int64_t columns, int64_t steps,
                              bool transposed, int64_t times) {
  products(a, b, c, rows, columns, steps / 2, transposed, times);
}

extern "C" void brgemm_bfloat16(const at::BFloat16* a, const at::BFloat16* b, float* c, int64_t rows, int64_t columns, int64_t steps,
                                int64_t times) {
  brgemms(a, b, c, rows, columns, steps, times);
}
#endif
