// The one micro-kernel behind every matrix product: acc[r][c] += a(r, k) * b(k, c), a read an element at a time and broadcast,
// b in vectors, the accumulators in registers for the whole sum over k. What becomes of a finished accumulator is the caller's.
#pragma once

#include "cpu/vec.h"

namespace smattn::cpu::SMATTN_LEVEL {

// a(r, k), the steps k side by side.
template <class T>
struct RowMajor {
  const T* data;
  int64_t stride;  // from row to row

  RowMajor from_row(int64_t r) const { return {data + r * stride, stride}; }
};

// a(r, k), the rows r side by side.
template <class T>
struct ColumnMajor {
  const T* data;
  int64_t stride;  // from step to step

  ColumnMajor from_row(int64_t r) const { return {data + r, stride}; }
};

// R elements of one step of either, and the way to the next step. Few pointers: row 4g + i is reached from that of row 4g.
template <class T, int R, class A>
struct Reader;

template <class T, int R>
struct Reader<T, R, RowMajor<T>> {
  const T* group[(R + 3) / 4];
  int64_t stride;

  explicit Reader(RowMajor<T> a) : stride(a.stride) {
    for (int g = 0; g < (R + 3) / 4; ++g) group[g] = a.data + 4 * g * a.stride;
  }
  T operator()(int r) const { return group[r / 4][(r % 4) * stride]; }
  void next() {
    for (int g = 0; g < (R + 3) / 4; ++g) ++group[g];
  }
};

template <class T, int R>
struct Reader<T, R, ColumnMajor<T>> {
  const T* step;
  int64_t stride;

  explicit Reader(ColumnMajor<T> a) : step(a.data), stride(a.stride) {}
  T operator()(int r) const { return step[r]; }
  void next() { step += stride; }
};

// b(k, c): C vectors side by side, `stride` elements from step to step.
template <class T>
struct Vectors {
  const T* data;
  int64_t stride;
};

// Memory that the next product reads, fetched into cache a line or two a step while this one computes: keys and values come from far,
// and the processor's own prefetching stops at the end of each head.
struct Ahead {
  const char *line, *last;  // null: nothing

  template <int Lines>
  void step() {
    for (int i = 0; i < Lines; ++i) {
      __builtin_prefetch(line);
      line = line < last ? line + 64 : last;
    }
  }
};

template <class T, int R, int C, class A, class Done>
inline void product_tile(A a, Vectors<T> b, int64_t steps, Ahead& ahead, const Done& done) {
  Vec<T> acc[R][C] = {};
  Reader<T, R, A> element(a);
  for (int64_t k = 0; k < steps; ++k) {
    Vec<T> row[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) row[c] = load(b.data + c * kLanes<T>);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = broadcast(element(r));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] += x * row[c];
    }
    ahead.step<C == 1 ? 2 : 1>();
    element.next();
    b.data += b.stride;
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) done(r, c, acc[r][c]);
  }
}

constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;
constexpr int kPanel = kRegisters == 32 ? 4 : 2;  // vectors side by side in a tile

// Tiles of R rows as long as there are as many rows left, then of fewer.
template <class T, int R, int C, class A, class Done>
inline void product_rows(A a, Vectors<T> b, int64_t rows, int64_t steps, int64_t row0, Ahead& ahead, const Done& done) {
  int64_t row = row0;
  for (; row + R <= rows; row += R) {
    product_tile<T, R, C>(a.from_row(row), b, steps, ahead, [&](int r, int c, Vec<T> acc) { done(row + r, c, acc); });
  }
  if constexpr (R > 1) {
    constexpr int kFewer = R > 16 ? 16 : R > 8 ? 8 : R > 4 ? 4 : R > 2 ? 2 : 1;
    if (row < rows) product_rows<T, kFewer, C>(a, b, rows, steps, row, ahead, done);
  }
}

// done(row, vector, sum over the steps of a(row, k) * b(k, vector)) for every row and vector.
template <class T, class A, class Done>
inline void product(A a, Vectors<T> b, int64_t rows, int64_t vectors, int64_t steps, Ahead ahead, const Done& done) {
  for (int64_t first = 0; first < vectors; first += kPanel) {
    const Vectors<T> panel = {b.data + first * kLanes<T>, b.stride};
    const auto at = [&](int64_t r, int c, Vec<T> acc) { done(r, first + c, acc); };
    const int64_t width = smaller_of<int64_t>(vectors - first, kPanel);
    if (width == 1) product_rows<T, kAccumulators, 1>(a, panel, rows, steps, 0, ahead, at);
    if (width == 2) product_rows<T, kAccumulators / 2, 2>(a, panel, rows, steps, 0, ahead, at);
    if constexpr (kPanel > 2) {
      if (width == 3) product_rows<T, kAccumulators / 3, 3>(a, panel, rows, steps, 0, ahead, at);
      if (width == 4) product_rows<T, kAccumulators / 4, 4>(a, panel, rows, steps, 0, ahead, at);
    }
  }
}

}  // namespace smattn::cpu::SMATTN_LEVEL
