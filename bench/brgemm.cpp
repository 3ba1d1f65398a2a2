// The micro-kernel of csrc/cpu/product.h and torch's exported brgemm (oneDNN's, made at run time) on the same tiles, for brgemm.py.
// c[rows][columns] = a[rows][steps] * b[steps][columns], `times` over; columns a whole number of vectors. One thread.
#include <ATen/native/CPUBlas.h>

#define SMATTN_LEVEL avx512
#include "cpu/product.h"

using namespace smattn::cpu::avx512;

template <class A>
static void products(A a, const float* b, float* c, int64_t rows, int64_t columns, int64_t steps, int64_t times) {
  for (int64_t n = 0; n < times; ++n) {
    product(a, Vectors<float>{b, columns}, rows, columns / kLanes<float>, steps, Ahead{},
            [&](int64_t r, int64_t v, Vec<float> x) { store(c + r * columns + v * kLanes<float>, x); });
  }
}

// a lies [rows][steps], or [steps][rows] when it is transposed.
extern "C" void ours_float32(const float* a, const float* b, float* c, int64_t rows, int64_t columns, int64_t steps, bool transposed,
                             int64_t times) {
  if (transposed) {
    products(ColumnMajor<float>{a, rows}, b, c, rows, columns, steps, times);
  } else {
    products(RowMajor<float>{a, steps}, b, c, rows, columns, steps, times);
  }
}

extern "C" void brgemm_float32(const float* a, const float* b, float* c, int64_t rows, int64_t columns, int64_t steps, int64_t times) {
  for (int64_t n = 0; n < times; ++n) at::native::cpublas::brgemm(rows, columns, steps, steps, columns, columns, false, a, b, c, false);
}

// b in pairs of steps: [steps / 2][columns][2].
extern "C" void brgemm_bfloat16(const at::BFloat16* a, const at::BFloat16* b, float* c, int64_t rows, int64_t columns, int64_t steps,
                                int64_t times) {
  for (int64_t n = 0; n < times; ++n) at::native::cpublas::brgemm(rows, columns, steps, steps, columns, columns, false, a, b, c, true);
}
