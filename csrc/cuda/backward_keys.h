// Backward over blocks of keys, reference.py (6)-(8): dK, dV and dM; and the attention map (9), which is summed over heads as dM is.
// A block owns a block of keys (a warp 16 of them), for some heads of some batch elements, and goes over a span of queries. Its scores
// are transposed, [keys, queries], so that P and dS are the left operands of dV and dK where they lie in registers.
// dM is summed over heads in shared memory, every element by the one thread that computes it: no atomics, nothing of size B*H*Nq*Nk.
#pragma once

#include "scores.h"

namespace smattn::cuda {

template <class Math, int D>
struct KeysShape {
  static constexpr int kRowBytes = D * sizeof(typename Math::Element);
  static constexpr int kWarps = kRowBytes <= 256 ? 4 : 2;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kQueries = kRowBytes <= 128 ? 64 : 8192 / kRowBytes;  // of a step
  static constexpr int kTileSpan = kRowBytes <= 512 ? 128 : 2 * kQueries;    // of a block, when it sums a tile over heads
  static constexpr size_t shared_bytes(bool tile) {
    return static_cast<size_t>((2 * kKeys + 4 * kQueries) * kRowBytes + (tile ? kKeys * kTileSpan * 4 : 0));
  }
};

// A block's place in the call.
struct KeysWork {
  int64_t first_key, first_query, last_query, first_head, first_batch;
};

SMATTN_DEVICE KeysWork keys_work(const KeysArgs& args, int keys) {
  const Sizes& size = args.call.scores.size;
  int64_t id = block_index();
  const int64_t head_blocks = size.H / args.heads, key_blocks = (size.Nk + keys - 1) / keys;
  const int64_t head_block = id % head_blocks;
  id /= head_blocks;
  const int64_t key_block = id % key_blocks;
  id /= key_blocks;
  const int64_t spans = (size.Nq + args.span - 1) / args.span, first_query = id % spans * args.span;
  const int64_t last_query = first_query + args.span < size.Nq ? first_query + args.span : size.Nq;
  return {key_block * keys, first_query, last_query, head_block * args.heads, id / spans * args.batches};
}

// [16 keys, QUERIES] of the sum over heads, where only the lane that adds to it looks.
template <int QUERIES>
struct PrivateTile {
  float* data;  // of the block's tile of these queries

  // each(x, sum, half, slot)
  template <class Each>
  SMATTN_DEVICE void for_each_with(Tile<QUERIES>& x, const Each& each) const {
    float* mine = data + warp_index() * QUERIES * 16 + lane_index();
    int i = 0;
    x.for_each([&](float& x, int half, int slot) { each(x, mine[kWarp * i++], half, slot); });
  }
};

template <int QUERIES>
SMATTN_DEVICE void store_tile_sum(const KeysArgs& args, const KeysWork& work, Head at, float* sums) {
  const Scores& scores = args.call.scores;
  const bool map = args.tile_sum == TileSum::kMap;
  const int64_t b = map || scores.mask_size[0] > 1 ? at.b : 0, h = args.tile_per_head ? at.h : 0, heads = args.tile_per_head ? scores.size.H : 1;
  const int64_t base = (b * heads + h) * scores.size.Nq;
  for (int64_t query = work.first_query; query < work.last_query; query += QUERIES) {
    const Place<QUERIES, true> place(scores, at.b, query, work.first_key + 16 * warp_index(), scores.size.Nk);
    const PrivateTile<QUERIES> tile{sums + (query - work.first_query) / QUERIES * QUERIES * 16 * (block_threads() / kWarp)};
    Tile<QUERIES> unused;
    tile.for_each_with(unused, [&](float&, float& sum, int half, int slot) {
      const int64_t i = place.query_at(half, slot), j = place.key_at(half, slot);
      if (i >= work.last_query || j >= scores.size.Nk) return;
      const int64_t to = (base + i) * scores.size.Nk + j;
      switch (args.tile_dtype) {
        case DType::kFloat32: static_cast<float*>(args.tile_out)[to] = sum; break;
        case DType::kFloat64: static_cast<double*>(args.tile_out)[to] = static_cast<double>(sum); break;
        case DType::kFloat16: round_to(static_cast<Half*>(args.tile_out)[to], sum); break;
        case DType::kBFloat16: round_to(static_cast<BFloat*>(args.tile_out)[to], sum); break;
      }
      sum = 0.0f;
    });
  }
}

// dK or dV of a warp's keys; exactly 0 where a key is padding, whatever was summed there.
template <class T, int D>
SMATTN_DEVICE void store_key_gradient(Tile<D>& x, void* to, const KeysArgs& args, int64_t b, int64_t g, int64_t first_key, int64_t depth, float factor) {
  const Sizes& size = args.call.scores.size;
  bool live[2];
  for (int half = 0; half < 2; ++half) live[half] = key_live(args.call.scores, b, first_key + row_of(half), size.Nk);
  auto* rows = static_cast<T*>(to) + (b * size.Hkv + g) * size.Nk * depth;
  x.for_each([&](float& x, int half, int slot) {
    const int64_t key = first_key + row_of(half), col = column_of(slot);
    if (key < size.Nk && col < depth) round_to(rows[key * depth + col], live[half] ? x * factor : 0.0f);
  });
}

// alpha_h * dS of a warp's keys, summed over queries.
SMATTN_DEVICE void store_row_sums(const KeysArgs& args, Head at, int64_t first_key, const float (&row_sums)[2]) {
  const Scores& scores = args.call.scores;
  const float alpha = alpha_of(scores, at.h);
  for (int half = 0; half < 2; ++half) {
    const float sum = alpha * row_sum(row_sums[half]);
    const int64_t key = first_key + row_of(half);
    if (lane_index() % 4 == 0 && key < scores.size.Nk) args.dmask_rows[at.row(scores.size) * scores.size.Nk + key] = sum;
  }
}

// One tile of scores of one head: P and dS, and what they add to.
template <class Math, int D, bool DKEY, bool DVALUE>
struct KeysStep {
  using T = typename Math::Element;
  using Shape = KeysShape<Math, D>;
  static constexpr int kQueries = Shape::kQueries;
  const KeysArgs& args;
  Head at;
  SharedTile<T, Shape::kKeys, D> k, v;
  Tile<DKEY ? D : 8>& dkey;
  Tile<DVALUE ? D : 8>& dvalue;
  float (&row_sums)[2];  // of dS over queries

  SMATTN_DEVICE void run(const KeysWork& work, int64_t query, SharedTile<T, kQueries, D> q, SharedTile<T, kQueries, D> dout, float* sums) const {
    const Scores& scores = args.call.scores;
    const int row = 16 * warp_index();
    const Place<kQueries, true> place(scores, at.b, query, work.first_key + row, scores.size.Nk);
    const float alpha = alpha_of(scores, at.h);
    Tile<kQueries> s, dp;
    if (scores.mask.data != nullptr) load_elements(dp, scores.mask, at, place);
    s.fill(0.0f);
    Math::multiply_rows(s, k, row, q, 0);
    finish_scores(s, dp, scores, alpha, place);
    const auto state = [&](int, int slot) {
      const int64_t i = query + column_of(slot);
      return i < work.last_query ? args.rows[at.row(scores.size) * scores.size.Nq + i] : RowState{infinity(), 0.0f, 0.0f, 0.0f};
    };
    const PrivateTile<kQueries> tile{sums};
    if (args.tile_sum == TileSum::kMap) {
      const float weight = args.head_weights[at.h];
      tile.for_each_with(s, [&](float& s, float& sum, int half, int slot) { sum = fmaf(weight, exp2_fast(s - state(half, slot).lse_log2), sum); });
      return;
    }
    output_gradient(dp, dout, row, place);
    gradient(s, dp, state, place);
    if (DVALUE && args.dvalue != nullptr) {
      drop(s, args.call, at, 1.0f, place);
      if constexpr (DVALUE) Math::multiply_tile(dvalue, s, dout, 0);
    }
    if (args.tile_sum == TileSum::kMaskGradient) tile.for_each_with(dp, [&](float& ds, float& sum, int, int) { sum = fmaf(alpha, ds, sum); });
    if (args.dmask_rows != nullptr) dp.for_each([&](float& ds, int half, int) { row_sums[half] += ds; });
    if (DKEY && args.dkey != nullptr) {
      if constexpr (DKEY) Math::multiply_tile(dkey, dp, q, 0);
    }
  }

  // dP of (6), or w_h * dA of (10)
  SMATTN_DEVICE void output_gradient(Tile<kQueries>& dp, SharedTile<T, kQueries, D> dout, int row, const Place<kQueries, true>& place) const {
    if (args.dmap.data != nullptr) {
      load_elements(dp, args.dmap, {at.b, 0}, place);
      const float weight = args.head_weights[at.h];
      dp.for_each([&](float& x, int, int) { x *= weight; });
    } else {
      dp.fill(0.0f);
      Math::multiply_rows(dp, v, row, dout, 0);
      drop(dp, args.call, at, args.call.keep_scale, place);
    }
  }
};

// All queries of the span, of one head.
template <class Math, int D, bool DKEY, bool DVALUE>
SMATTN_DEVICE void keys_head(const KeysStep<Math, D, DKEY, DVALUE>& step, const KeysWork& work, typename Math::Element* stages, float* sums) {
  using T = typename Math::Element;
  using Shape = KeysShape<Math, D>;
  constexpr int kQueries = Shape::kQueries;
  const KeysArgs& args = step.args;
  const auto stage = [&](int64_t tile, int which) { return SharedTile<T, kQueries, D>{stages + (tile % 2 * 2 + which) * kQueries * D}; };
  const auto load = [&](int64_t tile) {
    const int64_t first = work.first_query + tile * kQueries;
    const auto live = [&](int64_t i) { return i < work.last_query; };
    stage(tile, 0).load(query_rows<T>(args.call, step.at), first, live);
    if (args.dout.data != nullptr) {
      const Rows<T> dout = rows_of<T>(args.dout, step.at.b, step.at.h, args.call.scores.size.Dv, args.dout_aligned);
      stage(tile, 1).load(dout, first, live);
    }
    copy_async_commit();
  };
  load(0);
  const int64_t tiles = (work.last_query - work.first_query + kQueries - 1) / kQueries;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      load(tile + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();
    step.run(work, work.first_query + tile * kQueries, stage(tile, 0), stage(tile, 1), sums + tile * kQueries * Shape::kKeys);
    sync_block();
  }
}

template <class Math, int D, bool DKEY, bool DVALUE>
SMATTN_DEVICE void backward_keys_block(const KeysArgs& args, std::byte* shared) {
  using T = typename Math::Element;
  using Shape = KeysShape<Math, D>;
  const Scores& scores = args.call.scores;
  const Sizes& size = scores.size;
  const KeysWork work = keys_work(args, Shape::kKeys);
  const SharedTile<T, Shape::kKeys, D> k{reinterpret_cast<T*>(shared)}, v{k.data + Shape::kKeys * D};
  T* stages = v.data + Shape::kKeys * D;
  auto* sums = reinterpret_cast<float*>(stages + 4 * Shape::kQueries * D);
  if (args.tile_sum != TileSum::kNone)
    for (int i = thread_index(); i < Shape::kKeys * Shape::kTileSpan; i += block_threads()) sums[i] = 0.0f;
  const int64_t key = work.first_key + 16 * warp_index(), group = size.H / size.Hkv;
  const int64_t last_head = work.first_head + args.heads - 1, last_batch = work.first_batch + args.batches - 1;
  Tile<DKEY ? D : 8> dkey;
  Tile<DVALUE ? D : 8> dvalue;
  for (int64_t b = work.first_batch; b <= last_batch; ++b) {
    for (int64_t h = work.first_head; h <= last_head; ++h) {
      const int64_t g = h / group;
      if (h == work.first_head || h % group == 0) {
        const auto live = [&](int64_t j) { return key_live(scores, b, j, size.Nk); };
        sync_block();
        k.load(key_rows<T>(args.call, b, g), work.first_key, live);
        if (args.dout.data != nullptr) v.load(value_rows<T>(args.call, b, g), work.first_key, live);
        dkey.fill(0.0f);
        dvalue.fill(0.0f);
      }
      float row_sums[2] = {0.0f, 0.0f};
      keys_head<Math, D, DKEY, DVALUE>({args, {b, h}, k, v, dkey, dvalue, row_sums}, work, stages, sums);
      if (args.dmask_rows != nullptr) store_row_sums(args, {b, h}, key, row_sums);
      const bool finished = (b == last_batch && h == last_head) || (args.tile_per_head && args.batches == 1);
      if (args.tile_sum != TileSum::kNone && finished) store_tile_sum<Shape::kQueries>(args, work, {b, h}, sums);
      if ((h + 1) % group != 0) continue;
      if constexpr (DKEY)
        if (args.dkey != nullptr) store_key_gradient<T>(dkey, args.dkey, args, b, g, key, size.D, static_cast<float>(scores.scale));
      if constexpr (DVALUE)
        if (args.dvalue != nullptr) store_key_gradient<T>(dvalue, args.dvalue, args, b, g, key, size.Dv, args.call.keep_scale);
    }
  }
}

}  // namespace smattn::cuda
