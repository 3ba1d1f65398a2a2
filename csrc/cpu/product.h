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
  int64_t advance = 64;

  void spread_over(int64_t steps) { advance = last - line > 64 * steps ? 128 : 64; }
  void step() {
    __builtin_prefetch(line);
    if (advance > 64) __builtin_prefetch(line + 64);
    line = line < last ? line + advance : last;
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
    ahead.step();
    element.next();
    b.data += b.stride;
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) done(r, c, acc[r][c]);
  }
}

constexpr int kPanel = kRegisters == 32 ? 4 : 2;  // vectors side by side in a tile, at most

// Of a tile so many vectors wide, at most: the accumulators, a row of b and an element fill the registers. One vector wide, half of them
// keep the multipliers busy.
constexpr int height_of(int width) { return width == 1 ? kRegisters / 2 : (kRegisters - width - 1) / width; }

// A tile of `height` <= R rows.
template <class T, int R, int C, class A, class Done>
inline void product_rows(int64_t height, A a, Vectors<T> b, int64_t steps, Ahead& ahead, const Done& done) {
  if constexpr (R > 1) {
    if (height < R) return product_rows<T, R - 1, C>(height, a, b, steps, ahead, done);
  }
  product_tile<T, R, C>(a, b, steps, ahead, done);
}

// The rows in tiles of nearly equal height: a low one would wait for its own additions.
template <class T, int C, class A, class Done>
inline void product_panel(A a, Vectors<T> b, int64_t rows, int64_t steps, Ahead& ahead, const Done& done) {
  int64_t row = 0;
  for (int64_t tiles = blocks_of(rows, height_of(C)); tiles > 0; --tiles) {
    const int64_t height = blocks_of(rows - row, tiles);
    product_rows<T, height_of(C), C>(height, a.from_row(row), b, steps, ahead, [&](int r, int c, Vec<T> acc) { done(row + r, c, acc); });
    row += height;
  }
}

// done(row, vector, sum over the steps of a(row, k) * b(k, vector)) for every row and vector.
template <class T, class A, class Done>
inline void product(A a, Vectors<T> b, int64_t rows, int64_t vectors, int64_t steps, Ahead ahead, const Done& done) {
  for (int64_t first = 0; first < vectors; first += kPanel) {
    const Vectors<T> panel = {b.data + first * kLanes<T>, b.stride};
    const auto at = [&](int64_t r, int c, Vec<T> acc) { done(r, first + c, acc); };
    const int width = static_cast<int>(smaller_of<int64_t>(vectors - first, kPanel));
    if (first == 0) ahead.spread_over(blocks_of(rows, height_of(width)) * blocks_of(vectors, width) * steps);
    if (width == 1) product_panel<T, 1>(a, panel, rows, steps, ahead, at);
    if (width == 2) product_panel<T, 2>(a, panel, rows, steps, ahead, at);
    if constexpr (kPanel > 2) {
      if (width == 3) product_panel<T, 3>(a, panel, rows, steps, ahead, at);
      if (width == 4) product_panel<T, 4>(a, panel, rows, steps, ahead, at);
    }
  }
}

}  // namespace smattn::cpu::SMATTN_LEVEL
