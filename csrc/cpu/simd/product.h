// The one micro-kernel behind every matrix product: acc[r][c] += a(r, k) * b(k, c), a read an element at a time and broadcast,
// b in vectors, the accumulators in registers for the whole sum over k. What becomes of a finished accumulator is the caller's.
#pragma once

#include <type_traits>

#include "cpu/simd/vec.h"

namespace smattn::cpu::SMATTN_UNIT {

// Two bfloat16 that follow each other along the steps of a sum, the first in the lower half: what the dot instruction multiplies and adds,
// in float. Elements E are T, or pairs.
using BFloat16Pair = int32_t;

template <class E>
using SumOf = std::conditional_t<std::is_same_v<E, BFloat16Pair>, float, E>;
template <class E>
using Sum = Vec<SumOf<E>>;

template <class E>
constexpr int64_t kStepsPerElement = 1;  // steps in an element
template <>
constexpr int64_t kStepsPerElement<BFloat16Pair> = 2;

// What a product reads at a time, so many rows of a and so many steps (elements) of both: whole tiles, where there are any.
template <class E>
constexpr int64_t kRowUnit = 1;
template <class E>
constexpr int64_t kStepUnit = 1;
#if defined(SMATTN_TILES)
template <>
constexpr int64_t kRowUnit<BFloat16Pair> = 16;
template <>
constexpr int64_t kStepUnit<BFloat16Pair> = 16;
#endif

// An element, wherever it lies.
template <class E>
inline E element_at(const void* p) {
  E x;
  __builtin_memcpy(&x, p, sizeof(E));
  return x;
}

template <class V>
inline void multiply_add(V& sum, V a, V b) {
  sum = fused(a, b, sum);
}
#if defined(__AVX512BF16__)
inline void multiply_add(Vec<float>& sum, Vec<BFloat16Pair> a, Vec<BFloat16Pair> b) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)a);  // no subnormals
}
// The same of one element of a. gcc 12 has no pattern that broadcasts it on the way from memory.
inline void multiply_add_element(Vec<float>& sum, const BFloat16Pair* a, Vec<BFloat16Pair> b) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
}
#endif
template <class E>
inline void multiply_add_element(Sum<E>& sum, const E* a, Vec<E> b) {
  multiply_add(sum, broadcast(element_at<E>(a)), b);
}

// a(r, k), the steps k side by side.
template <class E>
struct RowMajor {
  const E* data;
  int64_t stride;  // from row to row

  RowMajor from_row(int64_t r) const { return {data + r * stride, stride}; }
};

// a(r, k), the rows r side by side.
template <class E>
struct ColumnMajor {
  const E* data;
  int64_t stride;  // from step to step

  ColumnMajor from_row(int64_t r) const { return {data + r, stride}; }
};

// R elements of one step of either, and the way to the next step. Few pointers: row 4g + i is reached from that of row 4g.
template <class E, int R, class A>
struct StepReader;

template <class E, int R>
struct StepReader<E, R, RowMajor<E>> {
  const E* group[(R + 3) / 4];
  int64_t stride;

  explicit StepReader(RowMajor<E> a) : stride(a.stride) {
    for (int g = 0; g < (R + 3) / 4; ++g) group[g] = a.data + 4 * g * a.stride;
  }
  const E* operator()(int r) const { return group[r / 4] + (r % 4) * stride; }
  void next() {
    for (int g = 0; g < (R + 3) / 4; ++g) ++group[g];
  }
};

template <class E, int R>
struct StepReader<E, R, ColumnMajor<E>> {
  const E* step;
  int64_t stride;

  explicit StepReader(ColumnMajor<E> a) : step(a.data), stride(a.stride) {}
  const E* operator()(int r) const { return step + r; }
  void next() { step += stride; }
};

// b(k, c): C vectors side by side, `stride` elements from step to step.
template <class E>
struct Vectors {
  const E* data;
  int64_t stride;
};

// A stretch of memory, fetched into cache a line or two at a time.
struct Stretch {
  const char *line = nullptr, *last = nullptr;  // null: nothing
  int64_t advance = 64;  // from one fetch to the next
  bool two = false;      // lines at a fetch

  // The same fetch again at the end of the stretch.
  void step() {
    __builtin_prefetch(line);
    if (two) __builtin_prefetch(line + 64);
    line = line < last ? line + advance : last;
  }
  // Takes lines that lie side by side by twos.
  void by_twos() {
    if (advance == 64) advance = 128, two = true;
  }
  // How many fetches come before the last. A shift, where the advance is the usual one.
  int64_t steps() const { return advance == 64 ? (last - line) / 64 : (last - line) / advance; }
};

// Memory that the next product reads, fetched while this one computes: keys and values come from far, and the processor's own prefetching
// stops at the end of each head.
struct Prefetch {
  Stretch now, next;  // the next is fetched after the first

  Prefetch then(const Prefetch& after) const { return now.line == nullptr ? after : Prefetch{now, after.now}; }
  Prefetch part(int64_t first, int64_t count, int64_t of) const {  // rows of it, where a product goes a few rows at a time
    const int64_t times = now.line == nullptr ? 0 : now.steps() + 1;
    const char *begin = now.line + times * first / of * now.advance, *end = now.line + times * (first + count) / of * now.advance;
    const Prefetch rows{{begin, end, now.advance, now.two}, {}};
    return first + count < of ? rows : rows.then({next, {}});
  }
  // The same where there are few steps, so many times at each.
  int64_t times_at_each(int64_t steps) const { return now.line == nullptr ? 0 : (times() + steps) / steps; }
  void fetch(int64_t times) {
    for (; times > 0 && now.line <= now.last; --times) {
      __builtin_prefetch(now.line);
      if (now.two) __builtin_prefetch(now.line + 64);
      now.line += now.advance;
      if (now.line > now.last) begin_next();
    }
  }
  void spread_over(int64_t steps) {  // where there are more lines than steps
    if (times() > steps) now.by_twos(), next.by_twos();
  }
  // Goes on with the next stretch after the first. Called between tiles, because the inner loop has no register left for it.
  void go_on_from(const char* line) {
    now.line = line;
    begin_next();
  }

 private:
  void begin_next() {
    if (now.line >= now.last && next.line != nullptr) now = next, next = {};
  }
  int64_t times() const { return now.steps() + next.steps(); }
};

template <class E, int R, int C, class A, class Done>
inline void product_tile(A a, Vectors<E> b, int64_t steps, Prefetch& to_fetch, const Done& done) {
  Stretch ahead{to_fetch.now.line, to_fetch.now.last, to_fetch.now.advance, to_fetch.now.two};  // field by field, for registers
  Sum<E> acc[R][C] = {};
  StepReader<E, R, A> element(a);
  for (int64_t k = 0; k < steps; ++k) {
    Vec<E> row[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) row[c] = load(b.data + c * kLanes<E>);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      if constexpr (C == 1) {
        multiply_add_element(acc[r][0], element(r), row[0]);
      } else {
        const Vec<E> x = broadcast(element_at<E>(element(r)));
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) multiply_add(acc[r][c], x, row[c]);
      }
    }
    ahead.step();
    element.next();
    b.data += b.stride;
  }
  to_fetch.go_on_from(ahead.line);
  const Done* held = &done;
  asm("" : "+r"(held));  // Its fields are loaded here, not ahead of the loop, which needs the registers for sums.
  const Done finish = *held;  // A copy, because a store might change the original, which would then be loaded again.
  finish(acc);
}

constexpr int kPanel = kRegisters == 32 ? 4 : 2;  // vectors side by side in a tile, at most

// Most rows of a tile `width` vectors wide: the accumulators, one row of b and one broadcast element must fit the registers. One vector
// wide, half of the registers keep the multipliers busy.
constexpr int most_rows(int width) { return width == 1 ? kRegisters / 2 : (kRegisters - width - 1) / width; }

// A tile of `height` <= R rows.
template <class E, int R, int C, class A, class Done>
inline void product_rows(int64_t height, A a, Vectors<E> b, int64_t steps, Prefetch& ahead, const Done& done) {
  if constexpr (R > 1) {
    if (height < R) return product_rows<E, R - 1, C>(height, a, b, steps, ahead, done);
  }
  product_tile<E, R, C>(a, b, steps, ahead, done);
}

// The rows in tiles of nearly equal height: a low one would wait for its own additions.
template <class E, int C, class A, class Done>
inline void product_panel(A a, Vectors<E> b, int64_t rows, int64_t steps, Prefetch& ahead, const Done& done) {
  int64_t row = 0;
  for (int64_t tiles = blocks_of(rows, most_rows(C)); tiles > 0; --tiles) {
    const int64_t height = blocks_of(rows - row, tiles);
    product_rows<E, most_rows(C), C>(height, a.from_row(row), b, steps, ahead, [done, row](const auto& sums) { done(row, sums); });
    row += height;
  }
}

// done(first row, first vector, sums[R][N]): the sums over the steps of a(row, k) * b(k, vector), a few rows and vectors at a time.
template <class E, class A, class Done>
inline void product(A a, Vectors<E> b, int64_t rows, int64_t vectors, int64_t steps, Prefetch ahead, const Done& done) {
  for (int64_t first = 0; first < vectors; first += kPanel) {
    const Vectors<E> panel = {b.data + first * kLanes<E>, b.stride};
    const auto at = [done, first](int64_t row, const auto& sums) { done(row, first, sums); };
    const int width = static_cast<int>(smaller_of<int64_t>(vectors - first, kPanel));
    if (first == 0) ahead.spread_over(blocks_of(rows, most_rows(width)) * blocks_of(vectors, width) * steps);
    if (width == 1) product_panel<E, 1>(a, panel, rows, steps, ahead, at);
    if (width == 2) product_panel<E, 2>(a, panel, rows, steps, ahead, at);
    if constexpr (kPanel > 2) {
      if (width == 3) product_panel<E, 3>(a, panel, rows, steps, ahead, at);
      if (width == 4) product_panel<E, 4>(a, panel, rows, steps, ahead, at);
    }
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
