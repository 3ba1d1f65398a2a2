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
  int b, h;
  SMATTN_DEVICE int64_t row(const Sizes& size) const { return b * size.H + h; }  // in (B, H)
};

template <class T>
SMATTN_DEVICE Rows<T> rows_of(const Tensor4& x, int b, int h, int64_t depth, bool aligned) {
  return {static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1], x.stride[2], x.stride[3], static_cast<int>(depth), aligned};
}
template <class T>
SMATTN_DEVICE Rows<T> query_rows(const Call& call, Head at) {
  return rows_of<T>(call.scores.query, at.b, at.h, call.scores.size.D, call.query_aligned);
}
template <class T>
SMATTN_DEVICE Rows<T> key_rows(const Call& call, int b, int g) {
  return rows_of<T>(call.scores.key, b, g, call.scores.size.D, call.key_aligned);
}
template <class T>
SMATTN_DEVICE Rows<T> value_rows(const Call& call, int b, int g) {
  return rows_of<T>(call.value, b, g, call.scores.size.Dv, call.value_aligned);
}

// Liveness of keys, as Before: those before `end` that are not padding.
struct LiveKeys {
  const Scores& scores;
  int b, end;

  template <int COUNT, class At>
  SMATTN_DEVICE uint32_t bits(const At& at) const {
    uint32_t bits = Before{end}.bits<COUNT>(at);
    if (scores.padding == nullptr) return bits;
    SMATTN_ROLLED  // an address for each would fill the registers
        for (int i = 0; i < COUNT; ++i) {
      const int64_t key = at(i);
      if (key < end && scores.padding[b * scores.padding_stride[0] + key * scores.padding_stride[1]]) bits &= ~(1u << i);
    }
    return bits;
  }
};

// alpha in base 2. A finite alpha stays finite, so that it leaves a score where M is 0 as it is.
SMATTN_DEVICE float in_base_2(float alpha) {
  constexpr float kMost = 3.402823466e38f;
  const float scaled = alpha * kLog2E;
  if (fabsf(alpha) == infinity() || fabsf(scaled) != infinity()) return scaled;
  return scaled < 0.0f ? -kMost : kMost;
}

SMATTN_DEVICE float alpha_of(const Scores& s, int h) {
  return s.mask.data == nullptr ? 0.0f : static_cast<const float*>(s.alpha)[h * s.alpha_stride];
}

// A warp's tile of scores: [16 queries, COLS keys], or with KEYS_IN_ROWS its transpose.
template <int COLS, bool KEYS_IN_ROWS>
struct Place {
  int query, key;  // of row and column 0
  int queries;     // how many there are
  uint32_t live;   // a bit for each of the lane's keys: by half with KEYS_IN_ROWS, by slot without

  SMATTN_DEVICE Place(const LiveKeys& keys, int query, int key) : query(query), key(key), queries(static_cast<int>(keys.scores.size.Nq)) {
    live = keys.bits<KEYS_IN_ROWS ? 2 : COLS / 4>([&](int i) { return key + (KEYS_IN_ROWS ? row_of(i) : column_of(i)); });
  }
  SMATTN_DEVICE bool is_live(int half, int slot) const { return (live >> (KEYS_IN_ROWS ? half : slot) & 1) != 0; }
  SMATTN_DEVICE bool has(int half, int slot) const { return is_live(half, slot) && query_at(half, slot) < queries; }
  SMATTN_DEVICE int query_at(int half, int slot) const { return query + (KEYS_IN_ROWS ? column_of(slot) : row_of(half)); }
  SMATTN_DEVICE int key_at(int half, int slot) const { return key + (KEYS_IN_ROWS ? row_of(half) : column_of(slot)); }
};

template <class T, int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void load_elements(Tile<COLS>& tile, const std::byte* element, int64_t row_bytes, int64_t column_bytes,
                                 const Place<COLS, KEYS_IN_ROWS>& place) {
  const std::byte* rows[2] = {element, element + 8 * row_bytes};
  tile.for_each([&](float& x, int half, int slot) {  // pointers that move on, not an address for every element
    const auto* here = reinterpret_cast<const T*>(rows[half] + slot % 2 * column_bytes);
    x = place.has(half, slot) ? to_float(load_constant(here)) : 0.0f;
    if (slot % 2 == 1) rows[half] = opaque(rows[half] + 8 * column_bytes);
  });
}

// The tile of a tensor (B, H, Nq, Nk) of any floating dtype, 0 where a key is not live: nothing is read there.
// first: the offset of its element (0, 0, 0, 0).
template <int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void load_elements(Tile<COLS>& tile, const Tensor4& from, Head at, const Place<COLS, KEYS_IN_ROWS>& place,
                                 int64_t first = 0) {
  const int64_t bytes = bytes_of(from.dtype);
  first += at.b * from.stride[0] + at.h * from.stride[1] + place.query_at(0, 0) * from.stride[2] + place.key_at(0, 0) * from.stride[3];
  const std::byte* element = opaque(static_cast<const std::byte*>(from.data) + first * bytes);
  const int64_t row_bytes = from.stride[KEYS_IN_ROWS ? 3 : 2] * bytes, column_bytes = from.stride[KEYS_IN_ROWS ? 2 : 3] * bytes;
  switch (from.dtype) {
    case DType::kFloat32: return load_elements<float>(tile, element, row_bytes, column_bytes, place);
    case DType::kFloat64: return load_elements<double>(tile, element, row_bytes, column_bytes, place);
    case DType::kFloat16: return load_elements<Half>(tile, element, row_bytes, column_bytes, place);
    case DType::kBFloat16: return load_elements<BFloat16>(tile, element, row_bytes, column_bytes, place);
  }
}

SMATTN_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-kLog2E * x)); }

// The tile of M, 0 where a key is not live, and past the last query, where P must not outgrow 16 bits.
template <int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void load_mask(Tile<COLS>& m, const Scores& scores, Head at, const Place<COLS, KEYS_IN_ROWS>& place) {
  load_elements(m, scores.mask, at, place, scores.mask_batch.offset_at(at.b));
  if (!scores.mask_is_logits) return;
  m.for_each([&](float& x, int half, int slot) { x = place.has(half, slot) ? sigmoid(x) : 0.0f; });
}

// An element of a tensor of any floating dtype.
SMATTN_DEVICE float load_element(const Tensor4& from, int64_t at) {
  switch (from.dtype) {
    case DType::kFloat32: return static_cast<const float*>(from.data)[at];
    case DType::kFloat64: return to_float(static_cast<const double*>(from.data)[at]);
    case DType::kFloat16: return to_float(static_cast<const Half*>(from.data)[at]);
    case DType::kBFloat16: return to_float(static_cast<const BFloat16*>(from.data)[at]);
  }
  return 0.0f;
}
SMATTN_DEVICE void store_element(void* to, DType dtype, int64_t at, float x) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(to)[at] = x; break;
    case DType::kFloat64: static_cast<double*>(to)[at] = static_cast<double>(x); break;
    case DType::kFloat16: round_to(static_cast<Half*>(to)[at], x); break;
    case DType::kBFloat16: round_to(static_cast<BFloat16*>(to)[at], x); break;
  }
}

// The gradient of an element of logits, (8), from that of M there. A 0 stays 0: the logits of padded keys may be NaN.
SMATTN_DEVICE float through_sigmoid(float dm, const Tensor4& logits, int64_t element) {
  if (dm == 0.0f) return 0.0f;
  const float e = exp2_fast(-kLog2E * fabsf(load_element(logits, element)));
  return dm * (e / ((1.0f + e) * (1.0f + e)));
}

// From x = <q, k> to a score (1) of a head and to an exponent of P (2), in base 2. m is M, when there is one.
struct HeadScores {
  float scale, alpha;
  bool has_mask;

  SMATTN_DEVICE HeadScores(const Scores& scores, float alpha)
      : scale(static_cast<float>(scores.scale) * kLog2E), alpha(in_base_2(alpha)), has_mask(scores.mask.data != nullptr) {}

  SMATTN_DEVICE float score(float x, float m) const {
    x = fmaf(x, scale, 0.0f);  // rounded by itself: nvcc would contract a product and what is subtracted from it, here and not in forward
    return has_mask ? fmaf(alpha, m, x) : x;
  }
  // alpha * M - L comes first, so that two fused multiply-adds make one.
  SMATTN_DEVICE float exponent(float x, float m, const LseState& row) const {
    return fmaf(x, scale, has_mask ? fmaf(alpha, m, -row.shift) : -row.shift);
  }
  // The scores are those of forward to the last bit, so that terms that cancel leave no P above 1.
  SMATTN_DEVICE float exponent(float x, float m, const NormalizerState& row) const { return fminf(score(x, m) - row.shift, 0.0f); }
};

// P (2) of such an exponent.
SMATTN_DEVICE float probability(float exponent, const LseState&) { return exp2_fast(exponent); }
SMATTN_DEVICE float probability(float exponent, const NormalizerState& row) { return exp2_fast(exponent) * row.factor; }

// From s = <q, k> to scores, -inf where the key is not live.
template <int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void finish_scores(Tile<COLS>& s, Tile<COLS>& m, const Scores& scores, float alpha, const Place<COLS, KEYS_IN_ROWS>& place) {
  const HeadScores head(scores, alpha);
  s.for_each_with(m, [&](float& x, float& m, int half, int slot) {
    x = head.score(x, m);
    if (!place.is_live(half, slot)) x = -infinity();
  });
}

// From s = <q, k> to exponents of P, -inf where the key is not live. row(half, slot) -> Math::RowState.
template <int COLS, bool KEYS_IN_ROWS, class Row>
SMATTN_DEVICE void finish_exponents(Tile<COLS>& s, Tile<COLS>& m, const Scores& scores, float alpha, const Row& row,
                                    const Place<COLS, KEYS_IN_ROWS>& place) {
  const HeadScores head(scores, alpha);
  s.for_each_with(m, [&](float& x, float& m, int half, int slot) {
    x = head.exponent(x, m, row(half, slot));
    if (!place.is_live(half, slot)) x = -infinity();
  });
}

// C of (3): sets to 0 what dropout drops, and multiplies the rest by keep_scale.
template <int COLS, bool KEYS_IN_ROWS>
SMATTN_DEVICE void drop(Tile<COLS>& p, const Call& call, Head at, float keep_scale, const Place<COLS, KEYS_IN_ROWS>& place) {
  if (call.drop_below == 0) return;
  const auto seed = static_cast<uint64_t>(*call.seed);
  const auto bh = static_cast<uint32_t>(at.row(call.scores.size));
  static_assert(COLS <= 64);
  uint32_t kept = 0;  // a bit an element; the loop is left rolled, or the ten rounds of 32 elements would fill the registers
  SMATTN_ROLLED
  for (int e = 0; e < COLS / 2; ++e) {
    const int half = e / 2 % 2, slot = e / 4 * 2 + e % 2;
    const auto i = static_cast<uint32_t>(place.query_at(half, slot)), j = static_cast<uint32_t>(place.key_at(half, slot));
    kept |= static_cast<uint32_t>(dropout_keeps(seed, bh, i, j, call.drop_below)) << e;
  }
  p.for_each([&](float& x, int half, int slot) { x = (kept >> (slot / 2 * 4 + half * 2 + slot % 2) & 1) != 0 ? x * keep_scale : 0.0f; });
}

// (6): s, exponents, becomes P, and dp becomes dS, exactly 0 where the key is not live. row(half, slot) -> Math::RowState.
template <int COLS, bool KEYS_IN_ROWS, class Row>
SMATTN_DEVICE void gradient(Tile<COLS>& s, Tile<COLS>& dp, const Row& row, const Place<COLS, KEYS_IN_ROWS>& place) {
  s.for_each_with(dp, [&](float& s, float& dp, int half, int slot) {
    s = probability(s, row(half, slot));
    dp = place.is_live(half, slot) ? s * (dp - row(half, slot).delta) : 0.0f;
  });
}

}  // namespace smattn::cuda
