// The products of a warp's tile, for every way to multiply: 16-bit tensor cores, TF32 tensor cores, and float32 by fused multiply-add.
// All five products of attention are one of two: rows times rows (S, dP), and a tile of registers times rows (O, dQ, dK, dV).
#pragma once

#include "args.h"
#include "tile.h"

namespace smattn::cuda {

// Element is Half or BFloat16.
template <class T>
struct HalfMath {
  using Element = T;
  using RowState = LseState;

  // acc [16, N] += a[:16] b[:N]^T
  template <int N, int ROWS_A, int ROWS_B, int D>
  static SMATTN_DEVICE void multiply_rows(Tile<N>& acc, SharedTile<T, ROWS_A, D> a, SharedTile<T, ROWS_B, D> b) {
    static_assert(N % 16 == 0 && D % 16 == 0);
    const int row = lane_index() % 8, matrix = lane_index() / 8;
    const auto lane_a = a.lane(row + 8 * (matrix & 1), matrix >> 1);
    const auto lane_b = b.lane(row + 8 * (matrix >> 1), matrix & 1);
    SMATTN_UNROLL
    for (int k = 0; k < D; k += 16) {
      uint32_t fa[4];
      load_matrices(fa, lane_a.from(0, k / 8));
      SMATTN_UNROLL
      for (int n = 0; n < N; n += 16) {
        uint32_t fb[4];
        load_matrices(fb, lane_b.from(n, k / 8));
        multiply_add(acc.x[n / 8], fa, fb[0], fb[1], T{});
        multiply_add(acc.x[n / 8 + 1], fa, fb[2], fb[3], T{});
      }
    }
  }

  // acc [16, D] += p b[:K], p [16, K] rounded to T
  template <int K, int ROWS_B, int D>
  static SMATTN_DEVICE void multiply_tile(Tile<D>& acc, const Tile<K>& p, SharedTile<T, ROWS_B, D> b) {
    static_assert(K % 16 == 0 && D % 16 == 0);
    const int matrix = lane_index() / 8;
    const auto lane = b.lane(lane_index() % 8 + 8 * (matrix & 1), matrix >> 1);
    SMATTN_UNROLL
    for (int k = 0; k < K; k += 16) {
      const auto& left = p.x[k / 8];
      const auto& right = p.x[k / 8 + 1];
      const uint32_t fa[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                              pack<T>(right[2], right[3])};
      SMATTN_UNROLL
      for (int n = 0; n < D; n += 16) {
        uint32_t fb[4];
        load_matrices_transposed(fb, lane.from(k, n / 8));
        multiply_add(acc.x[n / 8], fa, fb[0], fb[1], T{});
        multiply_add(acc.x[n / 8 + 1], fa, fb[2], fb[3], T{});
      }
    }
  }
};

struct Tf32Math {
  using Element = float;
  using RowState = LseState;

  template <int N, int ROWS_A, int ROWS_B, int D>
  static SMATTN_DEVICE void multiply_rows(Tile<N>& acc, SharedTile<float, ROWS_A, D> a, SharedTile<float, ROWS_B, D> b) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const auto lane_a = a.lane(g, 0);
    const auto lane_b = b.lane(g, 0);
    SMATTN_UNROLL
    for (int k = 0; k < D; k += 8) {
      const int c = k / 4;
      const uint32_t fa[4] = {to_tf32(lane_a.from(0, c)[t]), to_tf32(lane_a.from(8, c)[t]), to_tf32(lane_a.from(0, c + 1)[t]),
                              to_tf32(lane_a.from(8, c + 1)[t])};
      SMATTN_UNROLL
      for (int n = 0; n < N; n += 8) multiply_add_tf32(acc.x[n / 8], fa, to_tf32(lane_b.from(n, c)[t]), to_tf32(lane_b.from(n, c + 1)[t]));
    }
  }

  // The order of the sum over k is free: the tensor cores' k = t and t + 4 are the tile's columns 2t and 2t + 1, where p lies already.
  template <int K, int ROWS_B, int D>
  static SMATTN_DEVICE void multiply_tile(Tile<D>& acc, const Tile<K>& p, SharedTile<float, ROWS_B, D> b) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const auto lane = b.lane(2 * t, g / 4);
    SMATTN_UNROLL
    for (int k = 0; k < K; k += 8) {
      const auto& x = p.x[k / 8];
      const uint32_t fa[4] = {to_tf32(x[0]), to_tf32(x[2]), to_tf32(x[1]), to_tf32(x[3])};
      SMATTN_UNROLL
      for (int n = 0; n < D; n += 8)
        multiply_add_tf32(acc.x[n / 8], fa, to_tf32(lane.from(k, n / 4)[g % 4]), to_tf32(lane.from(k + 1, n / 4)[g % 4]));
    }
  }
};

struct FloatMath {
  using Element = float;
  using RowState = NormalizerState;

  struct alignas(16) Four {
    float x[4];
  };
  struct alignas(8) Two {
    float x[2];
  };

  template <int N, int ROWS_A, int ROWS_B, int D>
  static SMATTN_DEVICE void multiply_rows(Tile<N>& acc, SharedTile<float, ROWS_A, D> a, SharedTile<float, ROWS_B, D> b) {
    const auto lane_a = a.lane(lane_index() / 4, 0);
    const auto lane_b = b.lane(2 * (lane_index() % 4), 0);
    SMATTN_ROLLED
    for (int k = 0; k < D; k += 32) SMATTN_UNROLL
    for (int c = 0; c < 8; ++c) {
      const Four left = *reinterpret_cast<const Four*>(lane_a.from(0, c) + k);
      const Four right = *reinterpret_cast<const Four*>(lane_a.from(8, c) + k);
      SMATTN_UNROLL
      for (int n = 0; n < N / 8; ++n) SMATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const Four column = *reinterpret_cast<const Four*>(lane_b.from(8 * n + e, c) + k);
        SMATTN_UNROLL
        for (int i = 0; i < 4; ++i) {
          acc.x[n][e] = fmaf(left.x[i], column.x[i], acc.x[n][e]);
          acc.x[n][e + 2] = fmaf(right.x[i], column.x[i], acc.x[n][e + 2]);
        }
      }
    }
  }

  template <int K, int ROWS_B, int D>
  static SMATTN_DEVICE void multiply_tile(Tile<D>& acc, const Tile<K>& p, SharedTile<float, ROWS_B, D> b) {
    const int row_start = lane_index() & ~3, t = lane_index() % 4;
    const auto lane = b.lane(0, t / 2);
    SMATTN_UNROLL
    for (int k = 0; k < K; ++k) {
      const float left = shuffle(p.x[k / 8][k & 1], row_start + k % 8 / 2);
      const float right = shuffle(p.x[k / 8][2 + (k & 1)], row_start + k % 8 / 2);
      SMATTN_UNROLL
      for (int n = 0; n < D / 8; ++n) {
        const Two pair = *reinterpret_cast<const Two*>(lane.from(k, 2 * n) + t % 2 * 2);
        SMATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          acc.x[n][e] = fmaf(left, pair.x[e], acc.x[n][e]);
          acc.x[n][e + 2] = fmaf(right, pair.x[e], acc.x[n][e + 2]);
        }
      }
    }
  }
};

}  // namespace smattn::cuda
