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
    for (int n = 0; n < kBlocks; ++n) SMATTN_UNROLL
    for (int e = 0; e < 4; ++e) x[n][e] = value;
  }

  // each(x, half, slot): half 0 is row l/4, half 1 row l/4 + 8; slot counts the lane's columns, known when compiled, see column_of.
  template <class Each>
  SMATTN_DEVICE void for_each(const Each& each) {
    SMATTN_UNROLL
    for (int n = 0; n < kBlocks; ++n) SMATTN_UNROLL
    for (int e = 0; e < 4; ++e) each(x[n][e], e >> 1, 2 * n + (e & 1));
  }

  // The same over two tiles of one shape: each(x, y, half, slot).
  template <class Each>
  SMATTN_DEVICE void for_each_with(Tile& other, const Each& each) {
    SMATTN_UNROLL
    for (int n = 0; n < kBlocks; ++n) SMATTN_UNROLL
    for (int e = 0; e < 4; ++e) each(x[n][e], other.x[n][e], e >> 1, 2 * n + (e & 1));
  }

  SMATTN_DEVICE void scale_rows(const float (&factor)[2]) {
    SMATTN_UNROLL
    for (int n = 0; n < kBlocks; ++n) SMATTN_UNROLL
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

// Liveness of rows: all that are before `end`. bits(at) has a bit for each of the rows at(0), at(1), ...
struct Before {
  int end;

  template <int COUNT, class At>
  SMATTN_DEVICE uint32_t bits(const At& at) const {
    uint32_t bits = 0;
    SMATTN_UNROLL
    for (int i = 0; i < COUNT; ++i) bits |= static_cast<uint32_t>(at(i) < end) << i;
    return bits;
  }
};

// [ROWS, D] in shared memory, in chunks of 16 bytes whose place in a row is exchanged by the row's number, so that eight rows of one
// column of chunks, or eight chunks of one row, never meet in a bank.
template <class T, int ROWS, int D>
struct SharedTile {
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kChunks = D / kPerChunk;
  T* data;

  static constexpr int kLow = kChunks >= 8 ? 7 : 3;  // the bits of a chunk's number that change
  static SMATTN_DEVICE int swizzle(int row) { return kChunks >= 8 ? row & 7 : row >> 1 & 3; }

  SMATTN_DEVICE T* chunk(int row, int c) const { return data + row * D + ((c & ~kLow) + ((c & kLow) ^ swizzle(row))) * kPerChunk; }

  // One lane's addresses: from(R, C) is chunk(row + R, c + C). With R and C known when compiled, and no bit in both row and R or c and C,
  // all are a few bases and constants, so that they neither cost instructions nor fill the registers.
  struct Lane {
    T* base[kLow + 1];
    SMATTN_DEVICE T* from(int R, int C) const { return base[(C & kLow) ^ swizzle(R)] + (R * D + (C & ~kLow) * kPerChunk); }
  };
  SMATTN_DEVICE Lane lane(int row, int c) const {
    Lane lane;
    SMATTN_UNROLL
    for (int i = 0; i <= kLow; ++i) lane.base[i] = data + row * D + (i ^ c ^ swizzle(row)) * kPerChunk;
    return lane;
  }

  // The tile without its first `row` rows, a multiple of 8.
  SMATTN_DEVICE SharedTile from_row(int row) const { return {data + row * D}; }

  // Which of the rows first..first + ROWS that this thread copies are live, a bit each, see Before.
  template <int THREADS, class Live>
  static SMATTN_DEVICE uint32_t live_rows(int first, const Live& live) {
    const int row = first + thread_index() / kChunks;
    return live.template bits<kPasses<THREADS>>([&](int i) { return row + i * kStep<THREADS>; });
  }

  // Starts copying the rows of `from` from `first` on into the tile; 0 in rows that are not live and in columns past from.depth.
  template <int THREADS>
  SMATTN_DEVICE void load(const Rows<T>& from, int first, uint32_t live) const {
    const int thread = opaque(thread_index()), c = thread % kChunks, row = thread / kChunks, rest = from.depth - c * kPerChunk;
    const int count = rest < 0 ? 0 : rest < kPerChunk ? rest : kPerChunk;
    const T* source = from.data + (first + row) * from.stride_row + c * kPerChunk * from.stride_col;
    const Lane to = lane(row, c);
    if (from.aligned) {
      SMATTN_UNROLL
      for (int i = 0; i < kPasses<THREADS>; ++i) {
        const int wanted = (live >> i & 1) != 0 ? count : 0;
        if (ROWS % kStep<THREADS> == 0 || row + i * kStep<THREADS> < ROWS)
          copy_async(to.from(i * kStep<THREADS>, 0), wanted > 0 ? source : from.data, wanted * static_cast<int>(sizeof(T)));
        source = opaque(source + kStep<THREADS> * from.stride_row);
      }
    } else {
      SMATTN_ROLLED
      for (int i = 0; i < kPasses<THREADS>; ++i) {
        const int wanted = (live >> i & 1) != 0 ? count : 0;
        if (row + i * kStep<THREADS> >= ROWS) break;
        T* here = chunk(row + i * kStep<THREADS>, c);
        SMATTN_ROLLED
        for (int e = 0; e < kPerChunk; ++e) here[e] = e < wanted ? source[e * from.stride_col] : T{};
        source += kStep<THREADS> * from.stride_row;
      }
    }
  }

  // Rounds 16 rows of a warp's registers into the tile, or takes their remainders, from row `row` on, where only this warp looks.
  template <class What = AsRounded>
  SMATTN_DEVICE void put(const Tile<D>& x, int row) const {
    const Lane to = lane(row + row_of(0), column_of(0) / kPerChunk);
    SMATTN_UNROLL
    for (int n = 0; n < D / 8; ++n) SMATTN_UNROLL
    for (int half = 0; half < 2; ++half)
      put_pair<What>(to.from(8 * half, 8 * n / kPerChunk) + column_of(0) % kPerChunk, x.x[n][2 * half], x.x[n][2 * half + 1]);
  }

  // Copies rows row..row + 16 of the tile, but at most `rows` of them, to contiguous rows of `depth` elements, 16 bytes at a time if depth
  // allows. By one warp, after put.
  SMATTN_DEVICE void store(T* to, int row, int rows, int depth) const {
    const bool whole = depth % kPerChunk == 0;
    for (int i = lane_index(); i < 16 * kChunks; i += kWarp) {
      const int r = i / kChunks, col = i % kChunks * kPerChunk;
      if (r >= rows || col >= depth) continue;
      const T* from = chunk(row + r, i % kChunks);
      if (whole) {
        *reinterpret_cast<Chunk*>(to + static_cast<int64_t>(r) * depth + col) = *reinterpret_cast<const Chunk*>(from);
      } else {
        for (int e = 0; e < kPerChunk && col + e < depth; ++e) to[static_cast<int64_t>(r) * depth + col + e] = from[e];
      }
    }
  }

 private:
  template <int THREADS>
  static constexpr int kStep = THREADS / kChunks;  // rows that a block's threads copy at once
  template <int THREADS>
  static constexpr int kPasses = (ROWS + kStep<THREADS> - 1) / kStep<THREADS>;
  struct alignas(16) Chunk {
    uint32_t x[4];
  };
  struct alignas(8) Floats {
    float x[2];
  };

  template <class>
  static SMATTN_DEVICE void put_pair(float* to, float low, float high) {
    *reinterpret_cast<Floats*>(to) = {low, high};
  }
  template <class What, class Element>
  static SMATTN_DEVICE void put_pair(Element* to, float low, float high) {
    *reinterpret_cast<uint32_t*>(to) = pack<Element, What>(low, high);
  }
};

// 16 rows of a warp's registers to contiguous rows of `depth` elements in device memory, through a shared tile's rows row..row + 16.
template <class What = AsRounded, class T, int ROWS, int D>
SMATTN_DEVICE void store_tile(const Tile<D>& x, SharedTile<T, ROWS, D> shared, int row, T* to, int rows, int depth) {
  sync_warp();
  shared.template put<What>(x, row);
  sync_warp();
  shared.store(to, row, rows, depth);
}

// The same in float32, straight from the registers.
template <int D>
SMATTN_DEVICE void store_floats(Tile<D>& x, float* to, int rows, int depth) {
  x.for_each([&](float& x, int half, int slot) {
    if (row_of(half) < rows && column_of(slot) < depth) to[static_cast<int64_t>(row_of(half)) * depth + column_of(slot)] = x;
  });
}

}  // namespace smattn::cuda
