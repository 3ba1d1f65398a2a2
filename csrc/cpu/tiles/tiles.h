// The tiles that forward, backward and the attention map share. A tile is [key][lane]: the queries of a block lie in the SIMD lanes,
// so that softmax, sums and everything else along the keys is vertical, and only the query side is ever transposed.
// Lanes beyond the last query hold zeros (or what makes their probabilities 0) and are never stored.
#pragma once

#include <limits>

#include "cpu/simd/logarithms.h"
#include "cpu/tiles/blocking.h"
#include "cpu/tiles/operands.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class T>
inline T alpha_of(const Scores& s, int64_t h) {
  return s.alpha == nullptr ? T(0) : static_cast<const T*>(s.alpha)[h * s.alpha_stride];
}

// alpha in base 2. A finite alpha stays finite, so that it leaves a score where M is 0 as it is.
template <class T>
inline T alpha_log2_of(const Scores& s, int64_t h) {
  constexpr T kMost = std::numeric_limits<T>::max();
  const T alpha = alpha_of<T>(s, h), scaled = alpha * static_cast<T>(kLog2e);
  return scaled - scaled == T(0) || alpha - alpha != T(0) ? scaled : scaled < T(0) ? -kMost : kMost;
}

// Whether so many numbers fill vectors of E.
template <class E>
inline bool are_whole_vectors(int64_t numbers) {
  return numbers % (kStepsPerElement<E> * kLanes<E>) == 0;
}

// Whether whole vectors of rows of query or dout, `size` numbers each, are read as they lie.
template <class E>
inline bool queries_in_place(const Tensor4& t, int64_t size) {
  // Numbers far apart would not stay in the first-level cache together.
  const bool near = kStepsPerElement<E> > 1 ? t.stride[2] % kStepsPerElement<E> == 0 : t.stride[2] == size;
  return near && t.dtype == kStored<E> && t.stride[3] == 1 && are_whole_vectors<E>(size);
}

// Whether a block's queries, or its rows of dout, are so few that they are not transposed.
template <class E>
inline bool are_few(const QueryBlock& q, int64_t size) {
  return kFewQueries<E> > 0 && q.count <= kFewQueries<E> && are_whole_vectors<E>(size);
}

// A block of rows of query or dout for dot_products, in `to`: transposed, [size][lane], or if they are few as they are. Returns the rows as
// they lie where that can be read directly, else their copy in `copies`, or where they are few in `to`. Rows beyond the last, up to the
// lanes, are 0; of few, up to kFewQueries.
template <class E>
inline RowMajor<E> read_queries(const Tensor4& t, int64_t b, int64_t h, const QueryBlock& q, int64_t size, E* copies, E* to) {
  const Strided from = rows_of(t, b, h, q.first);
  if (are_few<E>(q, size)) {
    const int64_t stride = packed<E>(size);
    copy_rows<E>(from, q.count, size, to);
    fill<E>(to + q.count * stride, (kFewQueries<E> - q.count) * stride, E(0));
    return {to, stride};
  }
  RowMajor<E> rows = {copies, row_elements<E>(size)};
  if (q.count == q.lanes && queries_in_place<E>(t, size)) {
    const auto* first = static_cast<const char*>(from.data) + from.offset * bytes_of(from.dtype);
    rows = {reinterpret_cast<const E*>(first), from.row_stride / kStepsPerElement<E>};
  } else {
    copy_rows<E>(from, q.count, size, copies);
    fill<E>(copies + q.count * rows.stride, (q.lanes - q.count) * rows.stride, E(0));
  }
  transpose_block<E>(rows.data, rows.stride, q.lanes, packed<E>(size), to, q.lanes);
  return rows;
}

// Padded keys' rows of a block, `stride` elements each, are 0, whatever was there.
template <class T>
inline void clear_padded(const KeyBlock& k, int64_t stride, T* rows) {
  if (k.attended == k.count) return;
  for (int64_t j = 0; j < k.count; ++j) {
    if (k.padded[j]) fill<T>(rows + j * stride, stride, T(0));
  }
}

// Whether `count` rows of key or value, `size` numbers each, can be read as they lie.
template <class E>
inline bool keys_in_place(const Tensor4& t, int64_t count, int64_t size) {
  return t.stride[3] == 1 && size % (kStepsPerElement<E> * kStepUnit<E>) == 0 && count % kRowUnit<E> == 0 &&
         t.stride[2] % kStepsPerElement<E> == 0 && t.dtype == kStored<E>;
}

// Whether the numbers of a block's padded rows are finite, as most are: then a weight of 0 selects them out.
template <class Storage>
inline bool padding_is_finite(const Strided& rows, const KeyBlock& k, int64_t size) {
  const auto* row = static_cast<const Storage*>(rows.data) + rows.offset;
  for (int64_t j = 0; k.attended < k.count && j < k.count; ++j) {
    if (k.padded[j] && !all_finite(row + j * rows.row_stride, size)) return false;
  }
  return true;
}

// A block of rows of key or value: as they lie where that can be read directly, else a copy in which padded keys are 0. A copy's rows
// are whole vectors; as they lie, `unit` numbers at a time can be read to the end of one: beyond it is what lies between it and the next.
template <class E>
inline RowMajor<E> read_keys(const Tensor4& t, int64_t b, int64_t g, const KeyBlock& k, int64_t size, E* copy,
                             int64_t unit = kStepsPerElement<E>) {
  using Storage = std::conditional_t<kStepsPerElement<E> == 1, E, BFloat16>;
  const Strided rows = rows_of(t, b, g, k.first);
  const int64_t beyond = round_up(size, unit) - size;
  const bool to_the_end = beyond == 0 || (!k.is_last && rows.row_stride >= beyond);
  if (to_the_end && keys_in_place<E>(t, k.count, size) && padding_is_finite<Storage>(rows, k, size)) {
    return {reinterpret_cast<const E*>(static_cast<const char*>(t.data) + rows.offset * bytes_of(t.dtype)),
            rows.row_stride / kStepsPerElement<E>};
  }
  const int64_t stride = row_elements<E>(size);
  copy_rows<E>(rows, k.count, size, copy);
  clear_padded(k, stride, copy);
  fill<E>(copy + k.count * stride, (round_up(k.count, kRowUnit<E>) - k.count) * stride, E(0));
  return {copy, stride};
}

// `count` rows from `first` on, to be fetched ahead of their use; nothing where their numbers are not side by side. Of long rows that lie
// apart two lines each: the processor goes on by itself.
inline Prefetch rows_ahead(const Tensor4& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t size) {
  if (t.stride[3] != 1 || count <= 0) return {};
  const int64_t bytes = bytes_of(t.dtype), stride = t.stride[2] * bytes;
  const char *start = static_cast<const char*>(t.data) + rows_of(t, b, h, first).offset * bytes, *last_row = start + (count - 1) * stride;
  if (t.stride[2] > size && stride > 64) return {{start, last_row, stride, size * bytes > 64}, {}};
  return {{start, last_row + (size - 1) * bytes}, {}};
}
inline Prefetch keys_ahead(const Tensor4& t, const Sizes& n, int64_t b, int64_t h, int64_t first, int64_t count, int64_t size) {
  return rows_ahead(t, b, kv_head(n, h), first, smaller_of(count, n.Nk - first), size);
}

// A matrix of bfloat16 as a tile, keys by the vector of pairs: pairs are turned, which is half the work, and then widened. False, and then
// nothing is read, of any other matrix, or for a tile of double.
inline bool read_pairs(const Strided& matrix, const QueryBlock& q, const KeyBlock& k, float* tile) {
  constexpr int W = kLanes<float>;
  if (matrix.dtype != DType::kBFloat16 || matrix.column_stride != 1 || k.count % (2 * W) != 0) return false;
  const auto* row = static_cast<const BFloat16*>(matrix.data) + matrix.offset;
  for (int64_t lane = 0; lane < q.lanes; lane += W, row += W * matrix.row_stride) {
    for (int64_t j = 0; j < k.count; j += 2 * W) {
      Vec<float> v[W];
      for (int i = 0; i < W; ++i) {
        v[i] = lane + i < q.count ? load(reinterpret_cast<const float*>(row + i * matrix.row_stride + j)) : Vec<float>{};
      }
      transpose<float>(v);
      for (int i = 0; i < W; ++i) {
        float* to = tile + (j + 2 * i) * q.lanes + lane;
        store(to, (Vec<float>)((Vec<int32_t>)v[i] << 16)), store(to + q.lanes, (Vec<float>)((Vec<int32_t>)v[i] & -0x10000));
      }
    }
  }
  return true;
}
inline bool read_pairs(const Strided&, const QueryBlock&, const KeyBlock&, double*) { return false; }

// Rows [lane, lane + kLanes) of a matrix as columns of a tile. Blocks of kLanes rows and columns that hold T side by side are read as they
// lie, the rest by way of `rows`.
template <class T>
inline void turn_rows(Strided matrix, int64_t lane, const QueryBlock& q, const KeyBlock& k, T* rows, T* tile) {
  constexpr int64_t W = kLanes<T>;
  matrix.offset += lane * matrix.row_stride;
  const bool as_they_lie = matrix.dtype == kStored<T> && matrix.column_stride == 1 && lane + W <= q.count;
  const int64_t whole = as_they_lie ? k.count / W * W : 0, rest = k.count - whole, stride = round_up(rest, W);
  if (whole > 0) {
    transpose_block<T>(static_cast<const T*>(matrix.data) + matrix.offset, matrix.row_stride, W, whole, tile + lane, q.lanes);
  }
  if (rest == 0) return;
  matrix.offset += whole * matrix.column_stride;
  const int64_t count = smaller_of(W, q.count - lane);
  read_rows<T>(matrix, count, rest, rows, stride);
  fill<T>(rows + count * stride, (W - count) * stride, T(0));
  transpose_block<T>(rows, stride, W, rest, tile + whole * q.lanes + lane, q.lanes);
}

// A [query, key] matrix (M, or the attention map's gradient) as a tile; padded keys are 0. rows: [kLanes][keys up to whole vectors],
// overwritten.
template <class T>
inline void read_tile(const Tensor4& t, int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, T* rows, T* tile) {
  Strided matrix = rows_of(t, b, h, q.first);
  matrix.offset += k.first * t.stride[3];
  if (matrix.row_stride == 0) {
    read_rows<T>(matrix.transposed(), k.count, 1, rows, 1);
    for (int64_t j = 0; j < k.count; ++j) fill<T>(tile + j * q.lanes, q.lanes, rows[j]);
  } else if (matrix.row_stride == 1) {
    read_rows<T>(matrix.transposed(), k.count, q.count, tile, q.lanes);
  } else if (!read_pairs(matrix, q, k, tile)) {
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) turn_rows<T>(matrix, lane, q, k, rows, tile);
  }
  clear_padded(k, q.lanes, tile);
}

// Product sink that adds the result to the sums in memory, or stores it where there are none yet. Matrix tiles begin and end there.
template <class T>
struct AddTo {
  T* sums;
  int64_t stride;
  bool is_new;

  T* place(int64_t row, int64_t c) const { return sums + row * stride + c * kLanes<T>; }
  template <int R, int N>
  void operator()(int64_t row, int64_t c, const Vec<T> (&x)[R][N]) const {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) store(place(row + r, c + i), is_new ? x[r][i] : load(place(row + r, c + i)) + x[r][i]);
    }
  }
};

// <row, query> for `count` rows of key or value and the block's queries, which read_queries made: to `done`, as product's, or as a tile.
template <class E, class Done>
inline void dot_products(RowMajor<E> rows, const E* queries, const QueryBlock& q, int64_t count, int64_t size, const Prefetch& ahead,
                         const Done& done) {
  if (are_few<E>(q, size)) return dots_of_few(rows, queries, q.count, count, packed<E>(size) / kLanes<E>, ahead, done);
  product(rows, Vectors<E>{queries, q.lanes}, count, q.lanes / kLanes<SumOf<E>>, packed<E>(size), ahead, done);
}
template <class E, class T>
inline void dot_products(RowMajor<E> rows, const E* queries, const QueryBlock& q, int64_t count, int64_t size, const Prefetch& ahead,
                         T* tile) {
  dot_products(rows, queries, q, count, size, ahead, AddTo<T>{tile, q.lanes, true});
}

// From <q, k> to exponents of 2: (scale * <q, k> + alpha * M) * log2(e). The product is scaled, not q: a q that is rounded once more would
// leave its roundings where large terms cancel.
template <class E>
struct Exponents {
  using T = SumOf<E>;

  T factor, alpha;
  const T* mask;  // a tile, null where there is none

  Exponents(const Scores& s, int64_t h, const T* mask_tile)
      : factor(static_cast<T>(s.scale * kLog2e)), alpha(alpha_log2_of<T>(s, h)), mask(mask_tile) {}

  Vec<T> operator()(Vec<T> product, int64_t at) const {
    const Vec<T> x = product * factor;
    return mask == nullptr ? x : fused(broadcast(alpha), load(mask + at), x);
  }
  // The same less `subtracted`, by the steps that make the scores in forward, so that what cancels there cancels here; of pairs in two
  // operations.
  Vec<T> operator()(Vec<T> product, int64_t at, Vec<T> subtracted) const {
    if constexpr (kStepsPerElement<E> == 1) return (*this)(product, at) - subtracted;
    const Vec<T> rest = mask == nullptr ? -subtracted : fused(broadcast(alpha), load(mask + at), -subtracted);
    return fused(product, broadcast(factor), rest);
  }
};

}  // namespace smattn::cpu::SMATTN_UNIT
