// Tiles: 16 rows of float32 in a warp's registers, laid out as the tensor cores' accumulator, and operands in shared memory.
#pragma once

#include "device.h"

namespace smattn::cuda {

// [16, COLS] over a warp: lane l holds rows l/4 and l/4 + 8, of every 8 columns 2*(l%4) and the next.
template <int COLS>
struct Tile {
  static constexpr int kBlocks = COLS / 8;
  float x[kBlocks][4];

  SMATTN_DEVICE void fill(float value) {
  SMATTN_UNROLL
    for (int n = 0; n < kBlocks; ++n)
  SMATTN_UNROLL
      for (int e = 0; e < 4; ++e) x[n][e] = value;
  }

  // each(x, half, slot): half 0 is row l/4, half 1 row l/4 + 8; slot counts the lane's columns, known when compiled, see column_of.
  template <class Each>
  SMATTN_DEVICE void for_each(const Each& each) {
  SMATTN_UNROLL
    for (int n = 0; n < kBlocks; ++n)
  SMATTN_UNROLL
      for (int e = 0; e < 4; ++e) each(x[n][e], e >> 1, 2 * n + (e & 1));
  }

  // The same over two tiles of one shape: each(x, y, half, slot).
  template <class Each>
  SMATTN_DEVICE void for_each_with(Tile& other, const Each& each) {
  SMATTN_UNROLL
    for (int n = 0; n < kBlocks; ++n)
  SMATTN_UNROLL
      for (int e = 0; e < 4; ++e) each(x[n][e], other.x[n][e], e >> 1, 2 * n + (e & 1));
  }

  SMATTN_DEVICE void scale_rows(const float (&factor)[2]) {
  SMATTN_UNROLL
    for (int n = 0; n < kBlocks; ++n)
  SMATTN_UNROLL
      for (int e = 0; e < 4; ++e) x[n][e] *= factor[e >> 1];
  }
};

// Which of the warp's 16 rows a lane's half is, and which of the tile's columns its slot.
SMATTN_DEVICE int row_of(int half) { return lane_index() / 4 + 8 * half; }
SMATTN_DEVICE int column_of(int slot) { return 8 * (slot / 2) + 2 * (lane_index() % 4) + slot % 2; }

// Over the four lanes that share a row.
SMATTN_DEVICE float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
SMATTN_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Rows of a strided matrix in device memory.
template <class T>
struct Rows {
  const T* data;  // element (0, 0)
  int64_t stride_row, stride_col;
  int depth;     // columns
  bool aligned;  // 16-byte copies are possible: stride_col 1, data and stride_row multiples of 16 bytes
};

// [ROWS, D] in shared memory, in chunks of 16 bytes whose place in a row is exchanged by the row's number, so that eight rows of one
// column of chunks, or eight chunks of one row, never meet in a bank.
template <class T, int ROWS, int D>
struct SharedTile {
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kChunks = D / kPerChunk;
  static constexpr int kBytes = ROWS * D * sizeof(T);
  T* data;

  SMATTN_DEVICE T* chunk(int row, int c) const {
    const int swizzle = kChunks >= 8 ? row & 7 : (row >> 1) & 3;
    return data + (row * kChunks + (c ^ swizzle)) * kPerChunk;
  }
  SMATTN_DEVICE T* at(int row, int col) const { return chunk(row, col / kPerChunk) + col % kPerChunk; }

  // Starts copying rows first..first + ROWS of `from` into the tile; 0 in rows where live(row) is false and in columns past from.depth.
  template <class Live>
  SMATTN_DEVICE void load(const Rows<T>& from, int64_t first, const Live& live) const {
    for (int i = thread_index(); i < ROWS * kChunks; i += block_threads()) {
      const int row = i / kChunks, col = i % kChunks * kPerChunk;
      const int rest = from.depth - col, wanted = rest <= 0 || !live(first + row) ? 0 : rest < kPerChunk ? rest : kPerChunk;
      T* to = chunk(row, i % kChunks);
      const T* source = wanted > 0 ? from.data + (first + row) * from.stride_row + col * from.stride_col : from.data;
      if (from.aligned) {
        copy_async(to, source, wanted * static_cast<int>(sizeof(T)));
      } else {
  SMATTN_UNROLL
        for (int e = 0; e < kPerChunk; ++e) to[e] = e < wanted ? source[e * from.stride_col] : T{};
      }
    }
  }
};

}  // namespace smattn::cuda
