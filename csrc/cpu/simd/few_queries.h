// The dot products of many rows with few queries. In product.h each query has a lane of a vector to itself, and few would leave most lanes
// idle: here the lanes lie along the rows, and are added up at the end.
#pragma once

#include "cpu/simd/product.h"

namespace smattn::cpu::SMATTN_UNIT {

// So many queries at most: with more of them, adding up the lanes takes as long as it saves. Matrix tiles are no slower for few.
template <class E>
constexpr int kFewQueries = kStepUnit<E> == 1 ? kLanes<E> / 4 : 0;

// Lane i of the result is the sum of v[i]'s lanes, in the same order for every i. Overwrites v.
template <class T, int Stride = 1>
[[gnu::always_inline]] inline Vec<T> sums_of_lanes(Vec<T> (&v)[kLanes<T>]) {
  if constexpr (Stride == kLanes<T>) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes<T> / Stride; i += 2) {
      exchange<T, Stride>(v[i], v[i + 1]);
      v[i / 2] = v[i] + v[i + 1];
    }
    return sums_of_lanes<T, 2 * Stride>(v);
  }
}

// The Q lanes of v from `first` on; 0 beyond them.
template <class T, int Q>
[[gnu::always_inline]] inline Vec<T> lanes_from(Vec<T> v, int first) {
#if defined(__clang__)
  Vec<T> lanes{};
  for (int i = 0; i < Q; ++i) lanes[i] = v[first + i];
  return lanes;
#else
  typedef Bits<T> Index __attribute__((vector_size(kVectorBytes)));
  Index index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = i < Q ? first + i : kLanes<T>;
  return __builtin_shuffle(v, Vec<T>{}, index);
#endif
}

// A few rows from number `row` on: so many that their products with Q queries fill a vector, or where fewer are left the last `left`. Not
// inlined, for its sums need most registers.
template <class E, int Q, bool kWhole, class Done>
[[gnu::noinline]] void dot_few(RowMajor<E> rows, const E* queries, int64_t row, int64_t left, int64_t vectors, Prefetch& to_fetch,
                               int64_t at_each, const Done& done) {
  using T = SumOf<E>;
  constexpr int R = kLanes<T> / Q;
  Stretch ahead{to_fetch.now.line, to_fetch.now.last, to_fetch.now.advance, to_fetch.now.two};  // field by field, for registers
  const E* from = rows.data + row * rows.stride;
  Vec<T> sums[kLanes<T>] = {};  // [row][query]
  for (int64_t k = 0; k < vectors; ++k, from += kLanes<E>, queries += kLanes<E>) {
    Vec<E> query[Q];
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) query[i] = load(queries + i * vectors * kLanes<E>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<E> x = load(from + (kWhole ? r : smaller_of<int64_t>(r, left - 1)) * rows.stride);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) multiply_add(sums[r * Q + i], x, query[i]);
    }
    for (int64_t i = 0; i < at_each; ++i) ahead.step();
  }
  to_fetch.go_on_from(ahead.line);
  const Vec<T> all = sums_of_lanes<T>(sums);
  const Done finish = done;  // a copy, as in product_tile
  if constexpr (kWhole) {
    Vec<T> products[R][1];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) products[r][0] = lanes_from<T, Q>(all, r * Q);
    finish(row, 0, products);
  } else {
    for (int r = 0; r < left; ++r) {
      const Vec<T> products[1][1] = {{lanes_from<T, Q>(all, r * Q)}};
      finish(row + r, 0, products);
    }
  }
}

// <row, query> for `count` queries and `row_count` rows of `vectors` vectors: done(first row, 0, sums[R][1]), as by product() of one vector
// of queries. queries: [query][vectors], and zeros up to the next power of two of them.
template <class E, int Q = 1, class Done>
inline void dots_of_few(RowMajor<E> rows, const E* queries, int64_t count, int64_t row_count, int64_t vectors, Prefetch ahead,
                        const Done& done) {
  if constexpr (2 * Q <= kFewQueries<E>) {
    if (count > Q) return dots_of_few<E, 2 * Q>(rows, queries, count, row_count, vectors, ahead, done);
  }
  constexpr int64_t kTogether = kLanes<E> / Q;
  const int64_t steps = blocks_of(row_count, kTogether) * vectors;
  ahead.spread_over(steps);
  const int64_t at_each = ahead.times_at_each(steps);
  int64_t row = 0;
  for (; row + kTogether <= row_count; row += kTogether) dot_few<E, Q, true>(rows, queries, row, 0, vectors, ahead, at_each, done);
  if (row < row_count) dot_few<E, Q, false>(rows, queries, row, row_count - row, vectors, ahead, at_each, done);
}

}  // namespace smattn::cpu::SMATTN_UNIT
