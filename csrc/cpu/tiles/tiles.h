// The tiles that forward, backward and the attention map share. A tile is [key][lane]: the queries of a block lie in the SIMD lanes,
// so that softmax, sums and everything else along the keys is vertical, and only the query side is ever transposed.
// Lanes beyond the last query hold zeros (or what makes their probabilities 0) and are never stored.
#pragma once

#include "cpu/simd/exp2.h"
#include "cpu/tiles/operands.h"
#include "cpu/tiles/storage.h"

namespace smattn::cpu::SMATTN_UNIT {

constexpr int64_t kQueries = 64;  // at most, in a block
constexpr int64_t kKeys = 144;    // at most
constexpr double kLog2e = 1.44269504088896340736, kLog2eRest = 2.0355273740931033e-17;  // their sum is log2(e) to 107 bits
constexpr double kLn2 = 0.693147180559945309417, kLn2Rest = 2.319046813846299558e-17;

// Natural logarithms to exponents of 2 and back: rounded once, so that going there and back loses nothing that matters.
inline double to_log2(double x) { return __builtin_fma(x, kLog2e, x * kLog2eRest); }
inline double to_natural(double x) { return __builtin_fma(x, kLn2, x * kLn2Rest); }

// What to subtract from the exponents of a row: lse, but where that is infinite NaN, as any softmax is there.
inline double exponent_of(double lse) { return lse - lse == 0 ? to_log2(lse) : __builtin_nan(""); }

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
    key_blocks = blocks_of(Nk, kKeys);
    keys = round_up(blocks_of(Nk, larger_of<int64_t>(key_blocks, 1)), 8);
    key_blocks = blocks_of(Nk, larger_of<int64_t>(keys, 1));
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
  bool padded[kKeys];
};

template <class T>
inline KeyBlock key_block(const Scores& s, const Blocking<T>& blocking, int64_t b, int64_t index) {
  KeyBlock k;
  k.first = index * blocking.keys, k.count = smaller_of(blocking.keys, blocking.Nk - k.first);
  k.attended = 0;
  for (int64_t j = 0; j < k.count; ++j) {
    k.padded[j] = s.padding != nullptr && s.padding[b * s.padding_stride[0] + (k.first + j) * s.padding_stride[1]];
    k.attended += !k.padded[j];
  }
  return k;
}

// Keys in a strip of a tile: what passes over it read and write stays in the first-level cache.
template <class T>
inline int64_t strip_keys(int64_t lanes) {
  constexpr int64_t kStripBytes = 9 << 10;
  return larger_of<int64_t>(1, smaller_of(kKeys, kStripBytes / static_cast<int64_t>(sizeof(T)) / lanes));
}
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

// False where every key is padding: then, and only then, out and all gradients are 0.
inline bool has_keys(const Scores& s, int64_t b) {
  for (int64_t j = 0; j < s.size.Nk; ++j) {
    if (s.padding == nullptr || !s.padding[b * s.padding_stride[0] + j * s.padding_stride[1]]) return true;
  }
  return false;
}

inline int64_t kv_head(const Sizes& n, int64_t h) { return h / (n.H / n.Hkv); }

template <class T>
inline T alpha_of(const Scores& s, int64_t h) {
  return s.alpha == nullptr ? T(0) : static_cast<const T*>(s.alpha)[h * s.alpha_stride];
}

// A block of rows of query or dout times `factor` (1 for pairs), transposed: [size][lane]. Returns the rows, pairs as they lie where that
// can be read directly, else copied to `copies`. Rows beyond the last are 0.
template <class E>
inline RowMajor<E> read_queries(const Tensor4& t, int64_t b, int64_t h, const QueryBlock& q, int64_t size, typename SumOf<E>::type factor,
                                E* copies, E* columns) {
  const Strided from = rows_of(t, b, h, q.first);
  RowMajor<E> rows = {copies, row_elements<E>(size)};
  const bool whole = q.count == q.lanes && from.column_stride == 1 && from.row_stride % kStepsPerElement<E> == 0 &&
                     size % (kStepsPerElement<E> * kLanes<E>) == 0;
  if (kStepsPerElement<E> > 1 && whole) {
    rows = {reinterpret_cast<const E*>(static_cast<const BFloat16*>(from.data) + from.offset), from.row_stride / kStepsPerElement<E>};
  } else {
    copy_rows<E>(from, q.count, size, copies);
    fill<E>(copies + q.count * rows.stride, (q.lanes - q.count) * rows.stride, E(0));
  }
  transpose_block<E>(rows.data, rows.stride, q.lanes, packed<E>(size), columns, q.lanes);
  if constexpr (kStepsPerElement<E> == 1) {
    for (int64_t i = 0; i < size * q.lanes; ++i) columns[i] *= factor;
  }
  return rows;
}

// A block of rows of key or value: as they lie where that can be read directly, else a copy in which padded keys are 0. A copy's rows
// are whole vectors; so are the others' where their size is a multiple of `unit`, kLanes say.
template <class E>
inline RowMajor<E> read_keys(const Tensor4& t, int64_t b, int64_t g, const KeyBlock& k, int64_t size, E* copy,
                             int64_t unit = kStepsPerElement<E>) {
  const Strided rows = rows_of(t, b, g, k.first);
  const bool whole = t.stride[3] == 1 && size % unit == 0 && rows.row_stride % kStepsPerElement<E> == 0 && k.attended == k.count;
  if (whole && (kStepsPerElement<E> > 1 || t.dtype == DTypeOf<typename SumOf<E>::type>::value)) {
    return {reinterpret_cast<const E*>(static_cast<const char*>(t.data) + rows.offset * bytes_of(t.dtype)),
            rows.row_stride / kStepsPerElement<E>};
  }
  const int64_t stride = row_elements<E>(size);
  copy_rows<E>(rows, k.count, size, copy);
  for (int64_t j = 0; j < k.count; ++j) {
    if (k.padded[j]) fill<E>(copy + j * stride, stride, E(0));
  }
  return {copy, stride};
}

// `count` rows from `first` on, to be fetched ahead of their use; nothing where they are not side by side.
inline Prefetch rows_ahead(const Tensor4& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t size) {
  if (t.stride[3] != 1 || t.stride[2] != size || count <= 0) return {};
  const int64_t bytes = bytes_of(t.dtype);
  const char* start = static_cast<const char*>(t.data) + rows_of(t, b, h, first).offset * bytes;
  return {start, start + (count * size - 1) * bytes};
}
inline Prefetch keys_ahead(const Tensor4& t, const Sizes& n, int64_t b, int64_t h, int64_t first, int64_t count, int64_t size) {
  return rows_ahead(t, b, kv_head(n, h), first, smaller_of(count, n.Nk - first), size);
}

// Padded keys of a tile are 0, whatever was read there.
template <class T>
inline void select_attended(const QueryBlock& q, const KeyBlock& k, T* tile) {
  if (k.attended == k.count) return;
  for (int64_t j = 0; j < k.count; ++j) {
    if (k.padded[j]) fill<T>(tile + j * q.lanes, q.lanes, T(0));
  }
}

// A [query, key] matrix (M, or the attention map's gradient) as a tile; padded keys are 0. rows: [kQueries][kKeys], overwritten.
template <class T>
inline void read_tile(const Tensor4& t, int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, T* rows, T* tile) {
  Strided matrix = rows_of(t, b, h, q.first);
  matrix.offset += k.first * t.stride[3];
  if (matrix.row_stride == 0) {
    read_rows<T>(matrix.transposed(), k.count, 1, rows, 1);
    for (int64_t j = 0; j < k.count; ++j) fill<T>(tile + j * q.lanes, q.lanes, rows[j]);
  } else if (matrix.row_stride == 1) {
    read_rows<T>(matrix.transposed(), k.count, q.count, tile, q.lanes);
  } else {
    const int64_t stride = round_up(k.count, kLanes<T>);
    read_rows<T>(matrix, q.count, k.count, rows, stride);
    fill<T>(rows + q.count * stride, (q.lanes - q.count) * stride, T(0));
    transpose_block<T>(rows, stride, q.lanes, k.count, tile, q.lanes);
  }
  select_attended(q, k, tile);
}

// What becomes of a product that is a tile itself.
template <class T>
struct StoreTile {
  T* tile;
  int64_t lanes;

  template <int N>
  void operator()(int64_t j, int64_t c, const Vec<T> (&x)[N]) const {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(tile + j * lanes + (c + i) * kLanes<T>, x[i]);
  }
};

// <row, query> for `count` rows of key or value and the block's queries, [size][lanes], as a tile.
template <class E, class T>
inline void dot_products(RowMajor<E> rows, const E* queries, const QueryBlock& q, int64_t count, int64_t size, const Prefetch& ahead,
                         T* tile) {
  product(rows, Vectors<E>{queries, q.lanes}, count, q.lanes / kLanes<T>, packed<E>(size), ahead, StoreTile<T>{tile, q.lanes});
}

// Of such products, of queries times scale * log2(e) unless of pairs: scale * <q, k> + alpha * M in units of log2(e), the exponents of 2.
template <class E>
struct Exponents {
  using T = typename SumOf<E>::type;

  T factor, alpha;
  const T* mask;  // a tile, null where there is none

  Exponents(const Scores& s, int64_t h, const T* mask_tile)
      : factor(static_cast<T>(s.scale * kLog2e)), alpha(alpha_of<T>(s, h) * static_cast<T>(kLog2e)), mask(mask_tile) {}

  Vec<T> operator()(Vec<T> product, int64_t at) const {
    const Vec<T> x = kStepsPerElement<E> > 1 ? product * factor : product;
    return mask == nullptr ? x : x + alpha * load(mask + at);
  }
};

}  // namespace smattn::cpu::SMATTN_UNIT
