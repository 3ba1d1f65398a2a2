// The score tile, the same for every kernel: where it lies, M, padding, dropout and the gradient (reference.py (1), (2), (6)).
// Scores are in base 2 inside a kernel, a factor log2(e) folded into the scale and into alpha.
#pragma once

#include "../philox.h"
#include "args.h"
#include "tile.h"

namespace smattn::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// One (batch, head) of a call.
struct Head {
  int64_t b, h;
  SMATTN_DEVICE int64_t row(const Sizes& size) const { return b * size.H + h; }  // in (B, H)
};

template <class T>
SMATTN_DEVICE Rows<T> rows_of(const Tensor4& x, int64_t b, int64_t h, int64_t depth, bool aligned) {
  return {static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1], x.stride[2], x.stride[3], static_cast<int>(depth), aligned};
}
template <class T>
SMATTN_DEVICE Rows<T> query_rows(const Call& call, Head at) {
  return rows_of<T>(call.scores.query, at.b, at.h, call.scores.size.D, call.query_aligned);
}
template <class T>
SMATTN_DEVICE Rows<T> key_rows(const Call& call, int64_t b, int64_t g) {
  return rows_of<T>(call.scores.key, b, g, call.scores.size.D, call.key_aligned);
}
template <class T>
SMATTN_DEVICE Rows<T> value_rows(const Call& call, int64_t b, int64_t g) {
  return rows_of<T>(call.value, b, g, call.scores.size.Dv, call.value_aligned);
}

// The key is before `end` and not padding.
SMATTN_DEVICE bool key_live(const Scores& s, int64_t b, int64_t key, int64_t end) {
  return key < end && (s.padding == nullptr || !s.padding[b * s.padding_stride[0] + key * s.padding_stride[1]]);
}

SMATTN_DEVICE float alpha_of(const Scores& s, int64_t h) {
  return s.mask.data == nullptr ? 0.0f : static_cast<const float*>(s.alpha)[h * s.alpha_stride];
}

// A warp's tile of scores: [16 queries, COLS keys], or with KEYS_IN_ROWS its transpose.
template <int COLS, bool KEYS_IN_ROWS>
struct Place {
  int64_t query, key;  // of row and column 0
  int64_t queries;     // how many there are
  uint32_t live;       // a bit for each of the lane's keys: by half with KEYS_IN_ROWS, by slot without

  SMATTN_DEVICE Place(const Scores& s, int64_t b, int64_t query, int64_t key, int64_t key_end)
      : query(query), key(key), queries(s.size.Nq), live(0) {
    constexpr int kKeys = KEYS_IN_ROWS ? 2 : COLS / 4;
  SMATTN_UNROLL
    for (int i = 0; i < kKeys; ++i)
      live |= static_cast<uint32_t>(key_live(s, b, key + (KEYS_IN_ROWS ? row_of(i) : column_of(i)), key_end)) << i;
  }
  SMATTN_DEVICE bool is_live(int half, int slot) const { return (live >> (KEYS_IN_ROWS ? half : slot) & 1) != 0; }
  SMATTN_DEVICE int64_t query_at(int half, int slot) const { return query + (KEYS_IN_ROWS ? column_of(slot) : row_of(half)); }
  SMATTN_DEVICE int64_t key_at(int half, int slot) const { return key + (KEYS_IN_ROWS ? row_of(half) : column_of(slot)); }
};

template <class T, int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void load_elements(Tile<COLS>& tile, const T* data, int64_t stride_query, int64_t stride_key,
                                 const Place<COLS, KEYS_IN_ROWS>& place) {
  tile.for_each([&](float& x, int half, int slot) {
    const int64_t i = place.query_at(half, slot), j = place.key_at(half, slot);
    x = place.is_live(half, slot) && i < place.queries ? to_float(data[i * stride_query + j * stride_key]) : 0.0f;
  });
}

// The tile of a tensor (B, H, Nq, Nk) of any floating dtype, 0 where a key is not live: nothing is read there.
template <int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void load_elements(Tile<COLS>& tile, const Tensor4& from, Head at, const Place<COLS, KEYS_IN_ROWS>& place) {
  const int64_t first = at.b * from.stride[0] + at.h * from.stride[1];
  switch (from.dtype) {
    case DType::kFloat32: return load_elements(tile, static_cast<const float*>(from.data) + first, from.stride[2], from.stride[3], place);
    case DType::kFloat64: return load_elements(tile, static_cast<const double*>(from.data) + first, from.stride[2], from.stride[3], place);
    case DType::kFloat16: return load_elements(tile, static_cast<const Half*>(from.data) + first, from.stride[2], from.stride[3], place);
    case DType::kBFloat16: return load_elements(tile, static_cast<const BFloat*>(from.data) + first, from.stride[2], from.stride[3], place);
  }
}

// (1): from s = <q, k> to scores in base 2, -inf where the key is not live. m holds M, when there is one.
template <int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void finish_scores(Tile<COLS>& s, Tile<COLS>& m, const Scores& scores, float alpha, const Place<COLS, KEYS_IN_ROWS>& place) {
  const float scale = static_cast<float>(scores.scale) * kLog2E, alpha_log2 = alpha * kLog2E;
  const bool has_mask = scores.mask.data != nullptr;
  s.for_each_with(m, [&](float& x, float& m, int half, int slot) {
    x *= scale;
    if (has_mask) x = fmaf(alpha_log2, m, x);
    if (!place.is_live(half, slot)) x = -infinity();
  });
}

// C of (3): sets to 0 what dropout drops, and multiplies the rest by keep_scale.
template <int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void drop(Tile<COLS>& p, const Call& call, Head at, float keep_scale, const Place<COLS, KEYS_IN_ROWS>& place) {
  if (call.drop_below == 0) return;
  const auto seed = static_cast<uint64_t>(*call.seed);
  const auto bh = static_cast<uint32_t>(at.row(call.scores.size));
  p.for_each([&](float& x, int half, int slot) {
    const auto i = static_cast<uint32_t>(place.query_at(half, slot)), j = static_cast<uint32_t>(place.key_at(half, slot));
    x = dropout_keeps(seed, bh, i, j, call.drop_below) ? x * keep_scale : 0.0f;
  });
}

// (6): s becomes P, dp becomes dS, exactly 0 where the key is not live. row(half, slot) -> RowState.
template <int COLS, bool KEYS_IN_ROWS, class Row>
SMATTN_DEVICE void gradient(Tile<COLS>& s, Tile<COLS>& dp, const Row& row, const Place<COLS, KEYS_IN_ROWS>& place) {
  s.for_each_with(dp, [&](float& s, float& dp, int half, int slot) {
    const RowState& state = row(half, slot);
    const float p = exp2_fast(s - state.lse_log2);
    s = p;
    dp = place.is_live(half, slot) ? p * (dp - state.delta) : 0.0f;
  });
}

}  // namespace smattn::cuda
