// The matrix tiles of AMX: eight of 16 rows of 64 bytes, a product of two of them added to a third, and the same in software, bit for bit,
// so that what is built on them is tried out where there are none.
//
// The hardware's are written as assembly: gcc 12's _tile_loadconfig tells the compiler of 8 of the 64 bytes that it reads, and its
// _tile_loadd does not tell that it reads memory.
#pragma once

#include <cstdint>

namespace smattn::cpu::SMATTN_UNIT {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

#if defined(__x86_64__)
struct HardwareTiles {
  // A thread configures its tiles, whole ones all, before it uses them, and releases them afterwards: what it runs next finds none in use.
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < kTiles; ++tile) config.row_bytes[tile] = kTileBytes, config.rows[tile] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { asm volatile("tilerelease"); }

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // Rows `stride` bytes apart.
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // sum[m][n] += the sum over k of a[m][k] * b[k][n], floats of pairs of bfloat16: a's pairs lie side by side in its rows, b's in columns.
  template <int kSum, int kA, int kB>
  static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};
#endif

class SoftwareTiles {
 public:
  static void configure() { __builtin_memset(tiles_, 0, sizeof(tiles_)); }
  static void release() {}

  template <int kTile>
  static void zero() {
    __builtin_memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row)
      __builtin_memcpy(tiles_[kTile][row], static_cast<const char*>(from) + row * stride, kTileBytes);
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row) __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles_[kTile][row], kTileBytes);
  }
  template <int kSum, int kA, int kB>
  static void multiply_add() {
    for (int m = 0; m < kTileRows; ++m) add_row(tiles_[kA][m], tiles_[kB], tiles_[kSum][m]);
  }

 private:
  using Tile = char[kTileRows][kTileBytes];
  static constexpr int kColumns = 16;

  // Two chains of fused additions, of the first numbers of the pairs and of the second; their sum is what is added.
  static void add_row(const char* a, const Tile& b, char* sum_row) {
    float sum[kColumns], chain[2][kColumns] = {};
    for (int k = 0; k < kTileRows; ++k) {
      for (int half = 0; half < 2; ++half) {
        const float x = number(a + 4 * k + 2 * half);
        for (int n = 0; n < kColumns; ++n) {
          chain[half][n] = flushed(__builtin_fmaf(x, number(b[k] + 4 * n + 2 * half), chain[half][n]));
        }
      }
    }
    __builtin_memcpy(sum, sum_row, kTileBytes);
    for (int n = 0; n < kColumns; ++n) sum[n] = flushed(flushed(sum[n]) + flushed(chain[0][n] + chain[1][n]));
    __builtin_memcpy(sum_row, sum, kTileBytes);
  }
  static float number(const char* bfloat16) {
    uint16_t bits;
    __builtin_memcpy(&bits, bfloat16, 2);
    return flushed(__builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16));
  }
  // Subnormal numbers are 0 to the tiles, and their own are 0.
  static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

  static inline thread_local Tile tiles_[kTiles];
};

#if defined(SMATTN_TILES)
using Tiles = SMATTN_TILES;  // what the unit's products use
#endif

// Configures the calling thread's tiles, and releases them at the end of the scope.
struct TilesInUse {
#if defined(SMATTN_TILES)
  TilesInUse() { Tiles::configure(); }
  ~TilesInUse() { Tiles::release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
#else
  TilesInUse() {}
#endif
};

}  // namespace smattn::cpu::SMATTN_UNIT
