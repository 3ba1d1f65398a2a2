// Nq and Nk cut into blocks, and the keys of a block that are attended to.
#pragma once

#include "cpu/simd/vec.h"
#include "params.h"

namespace smattn::cpu::SMATTN_UNIT {

// At most so many queries and keys in a block; blocks of keys, and strips of them, are multiples of so many.
#if defined(SMATTN_TILES)
constexpr int64_t kQueries = 128, kKeys = 128, kKeyUnit = 32, kStripUnit = 32;
#else
constexpr int64_t kQueries = 64, kKeys = 144, kKeyUnit = 8, kStripUnit = 1;
#endif
static_assert(kKeys % kLanes<float> == 0, "memory for the keys of a block is read and written by whole vectors");

// Nq and Nk cut into blocks of nearly equal size: fixed by the shape alone, so that every sum has one order.
template <class T>
struct Blocking {
  int64_t Nq, Nk;
  int64_t query_blocks, queries;  // how many, and the size of all but the last
  int64_t key_blocks, keys;

  explicit Blocking(const Sizes& n) : Nq(n.Nq), Nk(n.Nk) {
    query_blocks = blocks_of(Nq, kQueries);
    queries = round_up(blocks_of(Nq, larger_of<int64_t>(query_blocks, 1)), kLanes<T>);
    query_blocks = blocks_of(Nq, larger_of<int64_t>(queries, 1));
    key_blocks = blocks_of(Nk, most_keys(n));
    keys = round_up(blocks_of(Nk, larger_of<int64_t>(key_blocks, 1)), kKeyUnit);
    key_blocks = blocks_of(Nk, larger_of<int64_t>(keys, 1));
  }

 private:
  // One vector of queries uses a row of key or value once: the rows of a block, which are fetched ahead, and its tiles stay in the
  // first-level cache together.
  int64_t most_keys(const Sizes& n) const {
    constexpr int64_t kCacheBytes = 36 << 10, kFewest = 48;
    if (kStripUnit > 1 || queries > kLanes<T>) return kKeys;
    const int64_t keys_in_cache = kCacheBytes / ((n.D + n.Dv + 2 * queries) * static_cast<int64_t>(sizeof(T)));
    return smaller_of(kKeys, larger_of(kFewest, keys_in_cache / kKeyUnit * kKeyUnit));
  }
};

// What a tile holds, so that it is not read again.
struct Held {
  int64_t a = -1, b = -1, c = -1, d = -1;
  bool differs(int64_t a1, int64_t b1, int64_t c1, int64_t d1) {
    if (a == a1 && b == b1 && c == c1 && d == d1) return false;
    a = a1, b = b1, c = c1, d = d1;
    return true;
  }
};

struct QueryBlock {
  int64_t first, count;
  int64_t lanes;  // count, rounded up to whole vectors: the row stride of this block's tiles
};

template <class T>
inline QueryBlock query_block(const Blocking<T>& blocking, int64_t index) {
  const int64_t first = index * blocking.queries, count = smaller_of(blocking.queries, blocking.Nq - first);
  return {first, count, round_up(count, kLanes<T>)};
}

struct KeyBlock {
  int64_t first, count;
  int64_t attended;     // keys of it that are not padding
  bool is_last;         // no keys come after it
  bool padded[kKeys];
};

template <class T>
inline KeyBlock key_block(const Scores& s, const Blocking<T>& blocking, int64_t b, int64_t index) {
  KeyBlock k;
  k.first = index * blocking.keys, k.count = smaller_of(blocking.keys, blocking.Nk - k.first);
  k.attended = 0, k.is_last = k.first + k.count == blocking.Nk;
  for (int64_t j = 0; j < k.count; ++j) {
    k.padded[j] = s.padding != nullptr && s.padding[b * s.padding_stride[0] + (k.first + j) * s.padding_stride[1]];
    k.attended += !k.padded[j];
  }
  return k;
}

// Keys in a strip of a tile: what passes over it read and write stays in the first-level cache.
constexpr int64_t kStripBytes = 9 << 10;
template <class T>
inline int64_t strip_keys(int64_t lanes) {
  const int64_t keys = smaller_of(kKeys, kStripBytes / static_cast<int64_t>(sizeof(T)) / lanes);
  return larger_of(kStripUnit, keys / kStripUnit * kStripUnit);
}
// The largest strip in numbers, with room for one more key: dropout makes the bits of two keys at a time.
template <class T>
constexpr int64_t kStripSize = larger_of<int64_t>(kStripBytes / static_cast<int64_t>(sizeof(T)), kStripUnit* kQueries) + kQueries;
inline KeyBlock strip_of(const KeyBlock& k, int64_t at, int64_t keys) {
  KeyBlock strip;
  strip.first = k.first + at, strip.count = smaller_of(keys, k.count - at);
  strip.attended = strip.count;
  for (int64_t j = 0; j < strip.count; ++j) {
    strip.padded[j] = k.padded[at + j];
    strip.attended -= strip.padded[j];
  }
  return strip;
}

inline int64_t kv_head(const Sizes& n, int64_t h) { return h / (n.H / n.Hkv); }

}  // namespace smattn::cpu::SMATTN_UNIT
