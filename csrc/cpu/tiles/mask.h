// The soft mask M as a tile, and dM on its way out: where the caller gave logits, M = sigmoid(logits), and neither M nor dM is ever whole.
#pragma once

#include "cpu/simd/exp2.h"
#include "cpu/tiles/tiles.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class T>
constexpr int64_t kSigmoids = kExpAtOnce * kLanes<T>;

// x[0 .. kSigmoids) = after(2^before(x)).
template <class T, class Before, class After>
inline void exp2_of(T* x, const Before& before, const After& after) {
  Vec<T> e[kExpAtOnce];
  for (int i = 0; i < kExpAtOnce; ++i) e[i] = before(load(x + i * kLanes<T>));
  exp2_each<T, kExpAtOnce>(e);
  for (int i = 0; i < kExpAtOnce; ++i) store(x + i * kLanes<T>, after(e[i]));
}

// The numbered one of the masks, as Tensor4 with no batch axis.
inline Tensor4 mask_at(const Scores& s, int64_t mask) {
  Tensor4 own = s.mask;
  own.data = static_cast<const char*>(s.mask.data) + s.mask_batch.offset_of(mask) * bytes_of(s.mask.dtype);
  return own;
}

// Which of the masks a tile of M is of: a batch element that selects padded keys out has its own.
inline int64_t mask_in_tile(const Scores& s, int64_t b, const KeyBlock& k) {
  return k.attended == k.count ? s.mask_batch.mask_of(b) : s.size.B + b;
}

// M of a query and a key block; padded keys are 0. rows: [kLanes][keys up to whole vectors], overwritten.
template <class T>
inline void read_mask(const Scores& s, int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, T* rows, T* tile) {
  read_tile<T>(mask_at(s, s.mask_batch.mask_of(b)), 0, h, q, k, rows, tile);
  if (!s.mask_is_logits) return;
  const int64_t size = k.count * q.lanes, whole = round_up(size, kSigmoids<T>);
  fill<T>(tile + size, whole - size, T(0));
  for (int64_t at = 0; at < whole; at += kSigmoids<T>) {
    exp2_of<T>(tile + at, [](Vec<T> x) { return x * static_cast<T>(-kLog2e); }, [](Vec<T> e) { return T(1) / (T(1) + e); });
  }
  clear_padded(k, q.lanes, tile);
}

// row[j] *= M (1 - M), j < columns: dM becomes the logits' gradient. A 0 stays 0: the logits of a padded key may be NaN.
template <class T>
inline void through_sigmoid(const Strided& logits, int64_t columns, T* row) {
  constexpr int64_t kAtOnce = 256;
  alignas(64) T x[kAtOnce];
  for (int64_t first = 0; first < columns; first += kAtOnce) {
    const int64_t count = smaller_of(kAtOnce, columns - first);
    Strided piece = logits;
    piece.offset += first * logits.column_stride;
    read_rows<T>(piece, 1, count, x, round_up(count, kSigmoids<T>));
    for (int64_t j = 0; j < count; j += kSigmoids<T>) {  // both factors from exp(-|x|): 1 - M as exact as M
      exp2_of<T>(
          x + j, [](Vec<T> logit) { return larger(logit, -logit) * static_cast<T>(-kLog2e); },
          [](Vec<T> e) { return e / ((T(1) + e) * (T(1) + e)); });
    }
    for (int64_t j = 0; j < count; ++j) row[first + j] = row[first + j] == T(0) ? T(0) : row[first + j] * x[j];
  }
}

// dM of the queries from q on and the keys from k on, [queries][keys] in rows of `stride`, to its place; mask is its number, and h that of
// M's axis.
template <class T>
inline void write_dmask(const Scores& s, int64_t mask, int64_t h, int64_t q, int64_t k, T* rows, int64_t stride, int64_t queries,
                        int64_t keys, void* dmask) {
  if (s.mask_is_logits) {
    Strided logits = rows_of(mask_at(s, mask), 0, h, q);
    logits.offset += k * s.mask.stride[3];
    for (int64_t i = 0; i < queries; ++i, logits.offset += logits.row_stride) through_sigmoid<T>(logits, keys, rows + i * stride);
  }
  const int64_t offset = ((mask * s.mask_size[1] + h) * s.mask_size[2] + q) * s.size.Nk + k;
  write_rows<T>(rows, stride, queries, keys, dmask, s.mask.dtype, offset, s.size.Nk);
}

}  // namespace smattn::cpu::SMATTN_UNIT
