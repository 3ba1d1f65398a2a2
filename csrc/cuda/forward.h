// Forward, reference.py (1)-(4): a block attends with one block of queries of one (batch, head) to one range of keys, by the online
// softmax. With few queries its warps share the queries and part the keys; with one range a block finishes its rows, with several it
// leaves them to forward_merge.h. Heads are the fastest index of the grid, so that those that share a tile of M read it together.
// Without a value only the rows are computed: lse, mbar, and eta of (10).
#pragma once

#include "scores.h"

namespace smattn::cuda {

template <class Math, int D>
struct ForwardShape {
  static constexpr int kRowBytes = D * sizeof(typename Math::Element);
  static constexpr int kKeys = kRowBytes <= 256 ? 64 : 16384 / kRowBytes;
  static constexpr int kWarps = kRowBytes <= 512 ? 4 : 2;
  static constexpr bool kHasFew = kRowBytes <= 256;  // a variant whose warps share 16 queries and part the keys
  static constexpr int queries(bool few) { return few ? 16 : 16 * kWarps; }
  static constexpr size_t shared_bytes(bool few) { return static_cast<size_t>((queries(few) + 4 * kKeys) * kRowBytes); }
};

// One warp's online softmax over its rows.
template <int D>
struct Softmax {
  float m[2] = {-infinity(), -infinity()}, l[2] = {0.0f, 0.0f}, average[2][2] = {};
  Tile<D> out;

  // s becomes exp2(s - m), what is summed already is rescaled.
  template <int COLS>
  SMATTN_DEVICE void step(Tile<COLS>& s) {
    float top[2] = {m[0], m[1]}, sum[2] = {0.0f, 0.0f}, rescale[2];
    s.for_each([&](float& x, int half, int) { top[half] = fmaxf(top[half], x); });
  SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      m[half] = rescale_to(half, row_max(top[half]), rescale[half]);
      top[half] = m[half] == -infinity() ? 0.0f : m[half];
    }
    s.for_each([&](float& x, int half, int) {
      x = exp2_fast(x - top[half]);
      sum[half] += x;
    });
  SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) l[half] = l[half] * rescale[half] + row_sum(sum[half]);
    out.scale_rows(rescale);
  }

  // The factor that takes sums from the old largest score to a new one; rows' averages are multiplied by it.
  SMATTN_DEVICE float rescale_to(int half, float top, float& factor) {
    factor = exp2_fast(m[half] - (top == -infinity() ? 0.0f : top));
    average[0][half] *= factor;
    average[1][half] *= factor;
    return top;
  }

  template <int COLS>
  SMATTN_DEVICE void add_average(int which, Tile<COLS>& p, Tile<COLS>& x) {
    float sum[2] = {0.0f, 0.0f};
    p.for_each_with(x, [&](float& p, float& x, int half, int) { sum[half] = fmaf(p, x, sum[half]); });
  SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) average[which][half] += row_sum(sum[half]);
  }

  // Everything a lane holds, in a fixed order.
  template <class Each>
  SMATTN_DEVICE void for_each(const Each& each) {
  SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      each(m[half]);
      each(l[half]);
      each(average[0][half]);
      each(average[1][half]);
    }
    out.for_each([&](float& x, int, int) { each(x); });
  }
  static constexpr int kHeld = 8 + Tile<D>::kBlocks * 4;

  SMATTN_DEVICE void merge(Softmax& other) {
    float mine[2], theirs[2];
  SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float top = fmaxf(m[half], other.m[half]);
      m[half] = rescale_to(half, top, mine[half]);
      other.m[half] = other.rescale_to(half, top, theirs[half]);
      l[half] = l[half] * mine[half] + other.l[half] * theirs[half];
      average[0][half] += other.average[0][half];
      average[1][half] += other.average[1][half];
    }
    out.for_each_with(other.out, [&](float& x, float& y, int half, int) { x = x * mine[half] + y * theirs[half]; });
  }
};

// The row's factor of O and its lse, from its finished sums, (3) and (4). A row without a live key is 0 with lse -inf; a row whose
// live scores are all -inf is NaN, as in plain torch.
SMATTN_DEVICE float finish_row(float m, float l, float& lse) {
  lse = l == 0.0f ? -infinity() : (m + log2_exact(l)) * kLn2;
  if (l == 0.0f) return 0.0f;
  return m == -infinity() ? not_a_number() : 1.0f / l;
}

SMATTN_DEVICE void store_row(const ForwardArgs& args, int64_t row, float lse, float factor, const float (&average)[2]) {
  args.lse[row] = lse;
  if (args.mbar != nullptr) args.mbar[row] = average[0] * factor;
  if (args.eta != nullptr) args.eta[row] = average[1] * factor;
}

template <class T, int D>
SMATTN_DEVICE void store_finished(const ForwardArgs& args, Softmax<D>& softmax, int64_t first_row, int64_t queries) {
  const int64_t depth = args.call.scores.size.Dv;
  float factor[2];
  SMATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float lse;
    factor[half] = finish_row(softmax.m[half], softmax.l[half], lse);
    const float average[2] = {softmax.average[0][half], softmax.average[1][half]};
    if (lane_index() % 4 == 0 && row_of(half) < queries) store_row(args, first_row + row_of(half), lse, factor[half], average);
    factor[half] *= args.call.keep_scale;
  }
  if (args.out == nullptr) return;
  softmax.out.for_each([&](float& x, int half, int slot) {
    if (row_of(half) >= queries || column_of(slot) >= depth) return;
    const int64_t at = (first_row + row_of(half)) * depth + column_of(slot);
    x *= factor[half];
    round_to(static_cast<T*>(args.out)[at], x);
    if (args.out_acc != nullptr) args.out_acc[at] = x;
  });
}

template <int D>
SMATTN_DEVICE void store_partial(const ForwardArgs& args, Softmax<D>& softmax, int64_t first_row, int64_t queries) {
  const int64_t depth = args.call.scores.size.Dv;
  SMATTN_UNROLL
  for (int half = 0; half < 2; ++half)
    if (lane_index() % 4 == 0 && row_of(half) < queries)
      args.partial_rows[first_row + row_of(half)] = {softmax.m[half], softmax.l[half], {softmax.average[0][half], softmax.average[1][half]}};
  if (args.out == nullptr) return;
  softmax.out.for_each([&](float& x, int half, int slot) {
    if (row_of(half) < queries && column_of(slot) < depth) args.partial_out[(first_row + row_of(half)) * depth + column_of(slot)] = x;
  });
}

// Warps that hold the same rows, over different keys, into the first of them.
template <int WARPS, int D>
SMATTN_DEVICE void merge_warps(Softmax<D>& softmax, float* shared) {
  using Held = Softmax<D>;
  int i = 0;
  softmax.for_each([&](float& x) { shared[(warp_index() * Held::kHeld + i++) * kWarp + lane_index()] = x; });
  sync_block();
  if (warp_index() > 0) return;
  for (int warp = 1; warp < WARPS; ++warp) {
    Held other;
    i = 0;
    other.for_each([&](float& x) { x = shared[(warp * Held::kHeld + i++) * kWarp + lane_index()]; });
    softmax.merge(other);
  }
}

// One tile of keys: scores, softmax, product with V.
template <class Math, int D, int KEYS, int ROWS, int TILE>
SMATTN_DEVICE void attend(const ForwardArgs& args, Softmax<D>& softmax, Head at, const Place<KEYS, false>& place, int row, int key_row,
                          SharedTile<typename Math::Element, ROWS, D> q, SharedTile<typename Math::Element, TILE, D> k,
                          SharedTile<typename Math::Element, TILE, D> v) {
  using T = typename Math::Element;
  const Scores& scores = args.call.scores;
  Tile<KEYS> s, m;
  if (scores.mask.data != nullptr) load_elements(m, scores.mask, at, place);
  s.fill(0.0f);
  Math::multiply_rows(s, q, row, k, key_row);
  finish_scores(s, m, scores, alpha_of(scores, at.h), place);
  softmax.step(s);
  if (args.mbar != nullptr) softmax.add_average(0, s, m);
  if (args.eta != nullptr) {
    load_elements(m, args.dmap, {at.b, 0}, place);
    softmax.add_average(1, s, m);
  }
  if (args.out == nullptr) return;
  drop(s, args.call, at, 1.0f, place);
  Math::multiply_tile(softmax.out, s, v, key_row);
  if (Math::kRounds && args.save_residual) {
    s.for_each([](float& x, int, int) { x -= to_float(rounded<T>(x)); });
    Math::multiply_tile(softmax.out, s, v, key_row);
  }
}

template <class Math, int D, bool FEW>
SMATTN_DEVICE void forward_block(const ForwardArgs& args, std::byte* shared) {
  using T = typename Math::Element;
  using Shape = ForwardShape<Math, D>;
  constexpr int kQueries = Shape::queries(FEW), kTile = Shape::kKeys, kKeys = FEW ? kTile / Shape::kWarps : kTile;
  const Scores& scores = args.call.scores;
  const Sizes& size = scores.size;

  int64_t id = block_index();
  const int64_t h = id % size.H, g = h / (size.H / size.Hkv), query_blocks = (size.Nq + kQueries - 1) / kQueries;
  id /= size.H;
  const int64_t first_query = id % query_blocks * kQueries;
  id /= query_blocks;
  const int64_t split = id % args.splits;
  const Head at{id / args.splits, h};
  const int64_t begin = split * args.split_keys, end = begin + args.split_keys < size.Nk ? begin + args.split_keys : size.Nk;

  const SharedTile<T, kQueries, D> q{reinterpret_cast<T*>(shared)};
  const auto stage = [&](int64_t tile, int which) {  // K and V of two tiles, after q
    return SharedTile<T, kTile, D>{q.data + (kQueries + (tile % 2 * 2 + which) * kTile) * D};
  };
  const auto load = [&](int64_t tile) {
    const auto live = [&](int64_t key) { return key_live(scores, at.b, key, end); };
    stage(tile, 0).load(key_rows<T>(args.call, at.b, g), begin + tile * kTile, live);
    if (args.out != nullptr) stage(tile, 1).load(value_rows<T>(args.call, at.b, g), begin + tile * kTile, live);
    copy_async_commit();
  };

  q.load(query_rows<T>(args.call, at), first_query, [&](int64_t i) { return i < size.Nq; });
  load(0);
  Softmax<D> softmax;
  softmax.out.fill(0.0f);
  const int row = FEW ? 0 : warp_index() * 16, key_row = FEW ? warp_index() * kKeys : 0;
  bool live = false;
  const int64_t tiles = (end - begin + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      load(tile + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();
    const Place<kKeys, false> place(scores, at.b, first_query + row, begin + tile * kTile + key_row, end);
    live |= place.live != 0;
    attend<Math, D>(args, softmax, at, place, row, key_row, q, stage(tile, 0), stage(tile, 1));
    sync_block();
  }
  live = any_in_block(live);
  if constexpr (FEW) {
    merge_warps<Shape::kWarps>(softmax, reinterpret_cast<float*>(shared));
    if (warp_index() > 0) return;
  }
  SMATTN_UNROLL
  for (int half = 0; half < 2; ++half)
    if (softmax.m[half] == -infinity() && softmax.l[half] == 0.0f && live) softmax.l[half] = 1.0f;
  const int64_t first_row = at.row(size) * size.Nq + first_query + row, rest = size.Nq - first_query - row;
  if (args.splits > 1) {
    store_partial(args, softmax, split * size.B * size.H * size.Nq + first_row, rest);
  } else {
    store_finished<T>(args, softmax, first_row, rest);
  }
}

}  // namespace smattn::cuda
