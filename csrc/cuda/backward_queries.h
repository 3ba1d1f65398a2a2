// Backward over blocks of queries, reference.py (6)-(8): dQ, and dalpha's partial sums; or before it the sums of P*dP, which are delta (5)
// where O was not kept in float32. A block owns a block of queries of one (batch, head) and goes over a range of keys; several ranges leave
// their dQ to be summed by sums.h. With few queries the warps of a block share the queries and part the keys, as in forward.h.
#pragma once

#include "work.h"

namespace smattn::cuda {

template <class Math, int D>
struct QueriesShape {
  static constexpr int kRowBytes = D * sizeof(typename Math::Element);
  static constexpr int kWarps = kRowBytes <= 256 ? 4 : 2;
  static constexpr bool kHasFew = kRowBytes <= 256;
  static constexpr int keys(bool few) { return few || kRowBytes <= 64 ? 64 : kRowBytes <= 256 ? 32 : 8192 / kRowBytes; }
  static constexpr int queries(bool few) { return few ? 16 : 16 * kWarps; }
  static constexpr size_t shared_bytes(bool few) { return static_cast<size_t>((2 * queries(few) + 4 * keys(few)) * kRowBytes); }
};

// SUMS: what goes into dalpha or delta. DQUERY: dQ.
template <class Math, int D, int KEYS, int ROWS, int TILE, bool DQUERY, bool SUMS>
struct QueriesStep {
  using T = typename Math::Element;
  using State = typename Math::RowState;
  const QueriesArgs& args;
  Head at;
  float alpha;
  SharedTile<T, ROWS, D> q, dout;  // from the warp's rows on
  State (&state)[2];
  Tile<DQUERY ? D : 8>& dquery;
  const float (&mbar)[2];
  float& dalpha;
  float (&delta)[2];  // sums of P*dP, where they are asked for

  SMATTN_DEVICE void run(const Place<KEYS, false>& place, SharedTile<T, TILE, D> k, SharedTile<T, TILE, D> v) const {
    const Scores& scores = args.call.scores;
    const bool has_mask = scores.mask.data != nullptr;
    Tile<KEYS> s, m, dp;
    if (has_mask) load_mask(m, scores, at, place);
    s.fill(0.0f);
    Math::multiply_rows(s, q, k);
    const auto row = [&](int half, int) { return state[half]; };
    finish_exponents(s, m, scores, alpha, row, place);
    if (args.dmap.data != nullptr) {
      load_elements(dp, args.dmap, {at.b, 0}, place);
      const float weight = args.head_weights[at.h];
      dp.for_each([&](float& x, int, int) { x *= weight; });
    } else {
      dp.fill(0.0f);
      Math::multiply_rows(dp, dout, v);
      drop(dp, args.call, at, args.call.keep_scale, place);
    }
    gradient(s, dp, row, place);
    if (SUMS && args.delta != nullptr) {  // the rows' own delta is 0 yet
      dp.for_each([&](float& ds, int half, int) { delta[half] += ds; });
      return;
    }
    if (SUMS && args.dalpha != nullptr)
      dp.for_each_with(m, [&](float& ds, float& m, int half, int) { dalpha = fmaf(ds, m - mbar[half], dalpha); });
    if constexpr (DQUERY)
      if (args.dquery != nullptr) Math::multiply_tile(dquery, dp, k);
  }
};

// Warps that hold the same rows, over different keys, into the first of them.
template <int WARPS, int D>
SMATTN_DEVICE void sum_warps(Tile<D>& x, float* shared) {
  constexpr int kHeld = Tile<D>::kBlocks * 4;
  int i = 0;
  x.for_each([&](float& x, int, int) { shared[(warp_index() * kHeld + i++) * kWarp + lane_index()] = x; });
  sync_block();
  if (warp_index() > 0) return;
  for (int warp = 1; warp < WARPS; ++warp) {
    i = 0;
    x.for_each([&](float& x, int, int) { x += shared[(warp * kHeld + i++) * kWarp + lane_index()]; });
  }
}

// What the lanes of a row have summed of P*dP, and with few queries the warps, in the order of the warps.
template <bool FEW, int WARPS>
SMATTN_DEVICE void store_delta(float* to, const float (&sums)[2], int rows, float* shared) {
  for (int half = 0; half < 2; ++half) {
    float sum = row_sum(sums[half]);
    if (FEW) {
      sync_block();
      if (lane_index() % 4 == 0) shared[warp_index() * 8 + lane_index() / 4] = sum;
      sync_block();
      sum = 0.0f;
      for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp * 8 + lane_index() / 4];
    }
    if (lane_index() % 4 == 0 && row_of(half) < rows && (!FEW || warp_index() == 0)) to[row_of(half)] = sum;
  }
}

// The block's sum of x, in a fixed order; whole in thread 0.
template <int WARPS>
SMATTN_DEVICE float block_sum(float x, float* shared) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  sync_block();
  if (lane_index() == 0) shared[warp_index()] = x;
  sync_block();
  float sum = 0.0f;
  for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp];
  return sum;
}

// A warp's rows of dQ, or of this range's part of it.
template <class T, int ROWS, int D>
SMATTN_DEVICE void store_dquery(const QueriesArgs& args, const QueryWork& work, Tile<D>& dquery, SharedTile<T, ROWS, D> shared, int row,
                                int64_t first_row, int rows) {
  const Sizes& size = args.call.scores.size;
  const int depth = static_cast<int>(size.D);
  const float scale = static_cast<float>(args.call.scores.scale);
  dquery.scale_rows({scale, scale});
  if (args.splits > 1) {
    store_floats(dquery, args.partial_dquery + (work.split * size.B * size.H * size.Nq + first_row) * depth, rows, depth);
  } else {
    store_tile(dquery, shared, row, static_cast<T*>(args.dquery) + first_row * depth, rows, depth);
  }
}

template <class Math, int D, bool FEW, bool DQUERY, bool SUMS>
SMATTN_DEVICE void backward_queries_block(const QueriesArgs& args, std::byte* shared) {
  using T = typename Math::Element;
  using State = typename Math::RowState;
  using Shape = QueriesShape<Math, D>;
  constexpr int kQueries = Shape::queries(FEW), kTile = Shape::keys(FEW), kKeys = FEW ? kTile / Shape::kWarps : kTile;
  constexpr int kThreads = Shape::kWarps * kWarp;
  const Scores& scores = args.call.scores;
  const Sizes& size = scores.size;

  const int query_blocks = tiles_of(static_cast<int>(size.Nq), kQueries);
  const QueryWork work(size, kQueries, query_blocks, args.splits, args.split_keys);
  const SharedTile<T, kQueries, D> q{reinterpret_cast<T*>(shared)}, dout{q.data + kQueries * D};
  const auto stage = [&](int tile, int which) {  // K and V of two tiles, after q and dout
    return SharedTile<T, kTile, D>{dout.data + (kQueries + (tile % 2 * 2 + which) * kTile) * D};
  };
  const LiveKeys keys{scores, work.at.b, work.last_key};
  const auto load = [&](int tile) {
    const int first = work.first_key + tile * kTile;
    const auto k = stage(tile, 0), v = stage(tile, 1);
    const uint32_t live = k.template live_rows<kThreads>(first, keys);
    k.template load<kThreads>(key_rows<T>(args.call, work.at.b, work.group), first, live);
    if (args.dout.data != nullptr) v.template load<kThreads>(value_rows<T>(args.call, work.at.b, work.group), first, live);
  };
  const uint32_t live_queries = q.template live_rows<kThreads>(work.first_query, Before{static_cast<int>(size.Nq)});
  q.template load<kThreads>(query_rows<T>(args.call, work.at), work.first_query, live_queries);
  if (args.dout.data != nullptr)
    dout.template load<kThreads>(rows_of<T>(args.dout, work.at.b, work.at.h, size.Dv, args.dout_aligned), work.first_query, live_queries);

  const int row = FEW ? 0 : warp_index() * 16, key_row = FEW ? warp_index() * kKeys : 0;
  const int64_t first_row = work.at.row(size) * size.Nq + work.first_query + row;
  const int rest = static_cast<int>(size.Nq) - work.first_query - row;
  const auto* rows = static_cast<const State*>(args.rows);
  State state[2];
  for (int half = 0; half < 2; ++half) state[half] = row_of(half) < rest ? rows[first_row + row_of(half)] : State{infinity()};
  const bool first = work.split == 0 && (!FEW || warp_index() == 0) && lane_index() % 4 == 0;  // adds the row's own term
  float mbar[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f}, dalpha = 0.0f;
  if (SUMS && args.dalpha != nullptr) {
    for (int half = 0; half < 2; ++half) {
      if (state[half].shift == infinity()) continue;  // dL of a dead row may be NaN
      const int64_t at = first_row + row_of(half);
      mbar[half] = args.mbar[at];
      if (first && args.dlse != nullptr) dalpha = fmaf(mbar[half], args.dlse[at], dalpha);
    }
  }
  Tile<DQUERY ? D : 8> dquery;
  dquery.fill(0.0f);
  const float alpha = alpha_of(scores, work.at.h);
  const QueriesStep<Math, D, kKeys, kQueries, kTile, DQUERY, SUMS> step{args,  work.at, alpha, q.from_row(row), dout.from_row(row),
                                                                        state, dquery,  mbar,  dalpha,          delta};
  pipeline(tiles_of(work.last_key - work.first_key, kTile), load, [&](int tile) {
    const int first_key = work.first_key + tile * kTile + key_row;
    const Place<kKeys, false> place(keys, work.first_query + row, first_key);
    step.run(place, stage(tile, 0).from_row(key_row), stage(tile, 1).from_row(key_row));
  });
  if (SUMS && args.delta != nullptr) {
    float* to = args.delta + work.split * size.B * size.H * size.Nq + first_row;
    return store_delta<FEW, Shape::kWarps>(to, delta, rest, reinterpret_cast<float*>(shared));
  }
  if (SUMS && args.dalpha != nullptr) {
    const float sum = block_sum<Shape::kWarps>(dalpha, reinterpret_cast<float*>(shared));
    if (thread_index() == 0) args.dalpha[(work.at.row(size) * query_blocks + work.query_block) * args.splits + work.split] = sum;
    sync_block();
  }
  if constexpr (DQUERY) {
    if (args.dquery == nullptr) return;
    if constexpr (FEW) {
      sum_warps<Shape::kWarps>(dquery, reinterpret_cast<float*>(shared));
      if (warp_index() > 0) return;
    }
    store_dquery(args, work, dquery, q, row, first_row, rest);
  }
}

}  // namespace smattn::cuda
