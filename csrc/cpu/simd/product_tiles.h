// The products of pairs of bfloat16 by matrix tiles, behind the interface of product.h: 2 x 2 tiles of sums at a time.
//
// A tile is never partial: a's rows and the steps of both are read up to whole tiles. Whoever makes the operands sees to it that what lies
// beyond can be read, and that beyond the last step it is 0 in both; of rows beyond the last the sums go nowhere.
#pragma once

#include "cpu/simd/amx.h"
#include "cpu/simd/product.h"

namespace smattn::cpu::SMATTN_UNIT {

#if defined(SMATTN_TILES)

// The sums of R x C tiles, in tiles 0 to 3: number 2r + c.
template <int R, int C>
inline void sum_in_tiles(RowMajor<BFloat16Pair> a, Vectors<BFloat16Pair> b, int64_t steps, int64_t times, Prefetch& ahead) {
  constexpr int64_t kBytes = sizeof(BFloat16Pair);
  for (int64_t k = 0; k < steps; k += kTileRows) {
    const BFloat16Pair *row = a.data + k, *step = b.data + k * b.stride;
    Tiles::load<6>(step, b.stride * kBytes);
    Tiles::load<4>(row, a.stride * kBytes);
    Tiles::multiply_add<0, 4, 6>();
    if constexpr (C == 2) Tiles::load<7>(step + kLanes<BFloat16Pair>, b.stride * kBytes), Tiles::multiply_add<1, 4, 7>();
    if constexpr (R == 2) Tiles::load<5>(row + kTileRows * a.stride, a.stride * kBytes), Tiles::multiply_add<2, 5, 6>();
    if constexpr (R == 2 && C == 2) Tiles::multiply_add<3, 5, 7>();
    ahead.fetch(times);
  }
}

// What the sums begin with: 0, or what a `done` that adds to memory finds there.
template <int R, int C, class Done>
inline void begin_sums(int64_t, int64_t, const Done&) {
  Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
}
template <class Done>
concept HasPlace = requires(const Done& done) { done.place(0, 0); };
template <int R, int C, HasPlace Done>
inline void begin_sums(int64_t row, int64_t first, const Done& done) {
  if (done.is_new) {
    Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
    return;
  }
  const float* from = done.place(row, first);
  const int64_t bytes = done.stride * static_cast<int64_t>(sizeof(float));
  Tiles::load<0>(from, bytes);
  if constexpr (C == 2) Tiles::load<1>(from + kLanes<float>, bytes);
  if constexpr (R == 2) Tiles::load<2>(from + kTileRows * done.stride, bytes);
  if constexpr (R == 2 && C == 2) Tiles::load<3>(from + kTileRows * done.stride + kLanes<float>, bytes);
}

// R tiles of `rows` rows in all to `done`, C vectors at a time, by way of memory.
template <int R, int C, class Done>
inline void hand_over(int64_t row, int64_t rows, int64_t first, const Done& done) {
  constexpr int64_t kStride = 2 * kLanes<float>, kRowBytes = kStride * static_cast<int64_t>(sizeof(float));
  alignas(64) float sums[R * kTileRows * kStride];
  Tiles::store<0>(sums, kRowBytes);
  if constexpr (C == 2) Tiles::store<1>(sums + kLanes<float>, kRowBytes);
  if constexpr (R == 2) Tiles::store<2>(sums + kTileRows * kStride, kRowBytes);
  if constexpr (R == 2 && C == 2) Tiles::store<3>(sums + kTileRows * kStride + kLanes<float>, kRowBytes);
  const auto hand_over_rows = [&]<int N>(int64_t r) {
    Vec<float> x[N][C];
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < C; ++c) x[i][c] = load(sums + (r + i) * kStride + c * kLanes<float>);
    }
    done(row + r, first, x);
  };
  constexpr int kAtOnce = 8;
  int64_t r = 0;
  for (; r + kAtOnce <= rows; r += kAtOnce) hand_over_rows.template operator()<kAtOnce>(r);
  for (; r < rows; ++r) hand_over_rows.template operator()<1>(r);
}

// The same to their place in memory, which has room for whole tiles.
template <int R, int C, HasPlace Done>
inline void hand_over(int64_t row, int64_t, int64_t first, const Done& done) {
  float* to = done.place(row, first);
  const int64_t bytes = done.stride * static_cast<int64_t>(sizeof(float));
  Tiles::store<0>(to, bytes);
  if constexpr (C == 2) Tiles::store<1>(to + kLanes<float>, bytes);
  if constexpr (R == 2) Tiles::store<2>(to + kTileRows * done.stride, bytes);
  if constexpr (R == 2 && C == 2) Tiles::store<3>(to + kTileRows * done.stride + kLanes<float>, bytes);
}

template <int C, class Done>
inline void product_in_tiles(RowMajor<BFloat16Pair> a, Vectors<BFloat16Pair> b, int64_t rows, int64_t first, int64_t steps, int64_t times,
                             Prefetch& ahead, const Done& done) {
  for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
    if (rows - row > kTileRows) {
      begin_sums<2, C>(row, first, done);
      sum_in_tiles<2, C>(a.from_row(row), b, steps, times, ahead);
      hand_over<2, C>(row, smaller_of<int64_t>(rows - row, 2 * kTileRows), first, done);
    } else {
      begin_sums<1, C>(row, first, done);
      sum_in_tiles<1, C>(a.from_row(row), b, steps, times, ahead);
      hand_over<1, C>(row, rows - row, first, done);
    }
  }
}

template <class Done>
inline void product(RowMajor<BFloat16Pair> a, Vectors<BFloat16Pair> b, int64_t rows, int64_t vectors, int64_t steps, Prefetch ahead,
                    const Done& done) {
  const int64_t times = ahead.times_at_each(blocks_of(rows, 2 * kTileRows) * blocks_of(vectors, 2) * blocks_of(steps, kTileRows));
  for (int64_t first = 0; first < vectors; first += 2) {
    const Vectors<BFloat16Pair> columns = {b.data + first * kLanes<BFloat16Pair>, b.stride};
    if (vectors - first > 1) {
      product_in_tiles<2>(a, columns, rows, first, steps, times, ahead, done);
    } else {
      product_in_tiles<1>(a, columns, rows, first, steps, times, ahead, done);
    }
  }
}

#endif

}  // namespace smattn::cpu::SMATTN_UNIT
