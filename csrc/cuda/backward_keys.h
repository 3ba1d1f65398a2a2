// Backward over blocks of keys, reference.py (6)-(8): dK, dV and dM; and the attention map (9), which is summed over heads as dM is.
// A block owns a block of keys (a warp 16 of them), for some heads of some batch elements, and goes over a span of queries. Its scores
// are transposed, [keys, queries], so that P and dS are the left operands of dV and dK where they lie in registers.
// dM is summed over heads in shared memory, every element by the one thread that computes it: no atomics, nothing of size B*H*Nq*Nk.
#pragma once

#include "work.h"

namespace smattn::cuda {

template <class Math, int D>
struct KeysShape {
  static constexpr int kRowBytes = D * sizeof(typename Math::Element);
  static constexpr int kWarps = kRowBytes <= 256 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kQueries = kRowBytes <= 64 ? 64 : kRowBytes <= 256 ? 32 : 8192 / kRowBytes;  // of a step
  static constexpr int kTileSpan = kRowBytes <= 512 ? 128 : 2 * kQueries;    // of a block, when it sums a tile over heads
  static constexpr size_t shared_bytes(bool tile) {
    const size_t rows = (2 * kKeys + 4 * kQueries) * kRowBytes, states = 2 * kQueries * sizeof(typename Math::RowState);
    return rows + states + (tile ? kKeys * kTileSpan * sizeof(float) : 0);
  }
};

// A block's place in the call.
struct KeysWork {
  int share;                    // which `batches` of all these are, in the order of MaskBatch
  int first_batch, last_batch;  // of elements that share a mask, MaskBatch::share_step() apart
  int first_head, first_key, first_query, last_query;

  // In 64 bits, cast at the end: from int arithmetic, which cannot overflow, nvcc derives addresses it then keeps in registers.
  SMATTN_DEVICE KeysWork(const KeysArgs& args, int keys) {
    const Sizes& size = args.call.scores.size;
    const MaskBatch& batch = args.call.scores.mask_batch;
    const int64_t head_blocks = size.H / args.heads, key_blocks = (size.Nk + keys - 1) / keys;
    const int64_t spans = (size.Nq + args.span - 1) / args.span;
    const int64_t id = block_index(), rest = id / head_blocks;
    first_head = static_cast<int>(id % head_blocks * args.heads);
    first_key = static_cast<int>(rest % key_blocks * keys);
    first_query = static_cast<int>(rest / key_blocks % spans * args.span);
    last_query = static_cast<int>(first_query + args.span < size.Nq ? first_query + args.span : size.Nq);
    const int64_t sharers = batch.sharers(size.B), shares = (sharers + args.batches - 1) / args.batches;
    const int64_t number = rest / key_blocks / spans, mask = number / shares;
    const int64_t first = number % shares * args.batches, end = first + args.batches < sharers ? first + args.batches : sharers;
    share = static_cast<int>(number);
    first_batch = static_cast<int>(batch.at_place(mask * sharers + first, size.B));
    last_batch = static_cast<int>(batch.at_place(mask * sharers + end - 1, size.B));
  }
};

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

template <int QUERIES, int WARPS>
SMATTN_DEVICE void store_tile_sum(const KeysArgs& args, const KeysWork& work, Head at, float* sums) {
  const Scores& scores = args.call.scores;
  const bool map = args.tile_sum == TileSum::kMap;
  const int64_t b = map ? at.b : scores.mask_batch.mask_of(at.b);
  const int64_t h = args.tile_per_head ? at.h : 0, heads = args.tile_per_head ? scores.size.H : 1;
  const int64_t base = (b * heads + h) * scores.size.Nq, mask = scores.mask_batch.offset_at(at.b) + at.h * scores.mask.stride[1];
  for (int query = work.first_query; query < work.last_query; query += QUERIES) {
    const Place<QUERIES, true> place({scores, at.b, static_cast<int>(scores.size.Nk)}, query, work.first_key + 16 * warp_index());
    const PrivateTile<QUERIES> tile{sums + (query - work.first_query) / QUERIES * QUERIES * 16 * WARPS};
    Tile<QUERIES> unused;
    tile.for_each_with(unused, [&](float&, float& sum, int half, int slot) {
      const int i = place.query_at(half, slot), j = place.key_at(half, slot);
      if (i >= work.last_query || j >= scores.size.Nk) return;
      if (!map && scores.mask_is_logits)
        sum = through_sigmoid(sum, scores.mask, mask + i * scores.mask.stride[2] + j * scores.mask.stride[3]);
      store_element(args.tile_out, args.tile_dtype, (base + i) * scores.size.Nk + j, sum);
      sum = 0.0f;
    });
  }
}

// dK or dV of a warp's keys, through the shared tile that held its K or V; exactly 0 where a key is padding, whatever was summed there.
template <class T, int ROWS, int D>
SMATTN_DEVICE void store_key_gradient(const KeysArgs& args, Tile<D>& x, SharedTile<T, ROWS, D> shared, void* to, int b, int g,
                                      int first_key, int64_t depth, float factor) {
  const Sizes& size = args.call.scores.size;
  const int keys = static_cast<int>(size.Nk), row = 16 * warp_index();
  const uint32_t live = LiveKeys{args.call.scores, b, keys}.bits<2>([&](int half) { return first_key + row_of(half); });
  x.for_each([&](float& x, int half, int) { x = (live >> half & 1) != 0 ? x * factor : 0.0f; });
  T* rows = static_cast<T*>(to) + ((b * size.Hkv + g) * size.Nk + first_key) * depth;
  store_tile(x, shared, row, rows, keys - first_key, static_cast<int>(depth));
}

// alpha_h * dS of a warp's keys, summed over queries, is stored as its row of dM, or added by the block that stored there before.
SMATTN_DEVICE void store_row_sums(const KeysArgs& args, const KeysWork& work, Head at, int first_key, const float (&row_sums)[2]) {
  const Scores& scores = args.call.scores;
  const Sizes& size = scores.size;
  const int group = static_cast<int>(size.H / size.Hkv), rows = static_cast<int>(args.row_per_head ? size.H : size.Hkv);
  const int64_t row = static_cast<int64_t>(work.share) * rows + (args.row_per_head ? at.h : at.h / group);
  const bool first = at.b == work.first_batch && (args.row_per_head || at.h % group == 0);
  const float alpha = alpha_of(scores, at.h);
  for (int half = 0; half < 2; ++half) {
    float sum = alpha * row_sum(row_sums[half]);
    const int64_t key = first_key + row_of(half), to = row * size.Nk + key;
    if (lane_index() % 4 != 0 || key >= size.Nk) continue;
    if (args.row_is_final && scores.mask_is_logits)
      sum =
          through_sigmoid(sum, scores.mask, scores.mask_batch.offset_at(at.b) + at.h * scores.mask.stride[1] + key * scores.mask.stride[3]);
    if (first) {
      store_element(args.row_out, args.row_dtype, to, sum);
    } else {
      static_cast<float*>(args.row_out)[to] += sum;
    }
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

  SMATTN_DEVICE void run(const KeysWork& work, int query, SharedTile<T, kQueries, D> q, SharedTile<T, kQueries, D> dout,
                         const typename Math::RowState* states, float* sums) const {
    const Scores& scores = args.call.scores;
    const int row = 16 * warp_index();
    const Place<kQueries, true> place({scores, at.b, static_cast<int>(scores.size.Nk)}, query, work.first_key + row);
    const float alpha = alpha_of(scores, at.h);
    Tile<kQueries> s, dp;
    if (scores.mask.data != nullptr) load_mask(dp, scores, at, place);
    s.fill(0.0f);
    Math::multiply_rows(s, k.from_row(row), q);
    const auto state = [&](int, int slot) { return states[column_of(slot)]; };
    finish_exponents(s, dp, scores, alpha, state, place);
    const PrivateTile<kQueries> tile{sums};
    if (args.tile_sum == TileSum::kMap) {
      const float weight = args.head_weights[at.h];
      tile.for_each_with(s, [&](float& s, float& sum, int half, int slot) {
        if (place.is_live(half, slot)) sum = fmaf(weight, probability(s, state(half, slot)), sum);
      });
      return;
    }
    if (args.dkey != nullptr || args.tile_sum != TileSum::kNone || args.row_out != nullptr)
      output_gradient(dp, dout, row, place);
    else
      dp.fill(0.0f);  // dV alone needs no dS
    gradient(s, dp, state, place);
    if (DVALUE && args.dvalue != nullptr) {
      drop(s, args.call, at, 1.0f, place);
      if constexpr (DVALUE) Math::multiply_tile(dvalue, s, dout);
    }
    if (args.tile_sum == TileSum::kMaskGradient)
      tile.for_each_with(dp, [&](float& ds, float& sum, int, int) { sum = fmaf(alpha, ds, sum); });
    if (args.row_out != nullptr) dp.for_each([&](float& ds, int half, int) { row_sums[half] += ds; });
    if (DKEY && args.dkey != nullptr) {
      if constexpr (DKEY) Math::multiply_tile(dkey, dp, q);
    }
  }

  // dP of (6), or w_h * dA of (10)
  SMATTN_DEVICE void output_gradient(Tile<kQueries>& dp, SharedTile<T, kQueries, D> dout, int row,
                                     const Place<kQueries, true>& place) const {
    if (args.dmap.data != nullptr) {
      load_elements(dp, args.dmap, {at.b, 0}, place);
      const float weight = args.head_weights[at.h];
      dp.for_each([&](float& x, int, int) { x *= weight; });
    } else {
      dp.fill(0.0f);
      Math::multiply_rows(dp, v.from_row(row), dout);
      drop(dp, args.call, at, args.call.keep_scale, place);
    }
  }
};

// All queries of the span, of one head.
template <class Math, int D, bool DKEY, bool DVALUE>
SMATTN_DEVICE void keys_head(const KeysStep<Math, D, DKEY, DVALUE>& step, const KeysWork& work, typename Math::Element* stages,
                             typename Math::RowState* states, float* sums) {
  using T = typename Math::Element;
  using State = typename Math::RowState;
  using Shape = KeysShape<Math, D>;
  constexpr int kQueries = Shape::kQueries;
  const KeysArgs& args = step.args;
  const auto stage = [&](int tile, int which) {  // Q and dO of two tiles
    return SharedTile<T, kQueries, D>{stages + (tile % 2 * 2 + which) * kQueries * D};
  };
  const auto load = [&](int tile) {
    const int first = work.first_query + tile * kQueries;
    const auto q = stage(tile, 0), dout = stage(tile, 1);
    const uint32_t live = q.template live_rows<Shape::kThreads>(first, Before{work.last_query});
    q.template load<Shape::kThreads>(query_rows<T>(args.call, step.at), first, live);
    if (const int i = first + thread_index(); thread_index() < kQueries) {  // zeros past the end are harmless: Q and dO are 0 there
      const auto* rows = static_cast<const State*>(args.rows);
      const State* row = rows + step.at.row(args.call.scores.size) * args.call.scores.size.Nq + i;
      const bool is_there = i < work.last_query;
      copy_async<sizeof(State)>(states + tile % 2 * kQueries + thread_index(), is_there ? row : rows, is_there ? sizeof(State) : 0);
    }
    if (args.dout.data == nullptr) return;
    const Rows<T> dout_rows = rows_of<T>(args.dout, step.at.b, step.at.h, args.call.scores.size.Dv, args.dout_aligned);
    dout.template load<Shape::kThreads>(dout_rows, first, live);
  };
  pipeline(tiles_of(work.last_query - work.first_query, kQueries), load, [&](int tile) {
    const State* rows = states + tile % 2 * kQueries;
    step.run(work, work.first_query + tile * kQueries, stage(tile, 0), stage(tile, 1), rows, sums + tile * kQueries * Shape::kKeys);
  });
}

template <class Math, int D, bool DKEY, bool DVALUE>
SMATTN_DEVICE void backward_keys_block(const KeysArgs& args, std::byte* shared) {
  using T = typename Math::Element;
  using Shape = KeysShape<Math, D>;
  const Scores& scores = args.call.scores;
  const Sizes& size = scores.size;
  const KeysWork work(args, Shape::kKeys);
  const SharedTile<T, Shape::kKeys, D> k{reinterpret_cast<T*>(shared)}, v{k.data + Shape::kKeys * D};
  T* stages = v.data + Shape::kKeys * D;
  auto* states = reinterpret_cast<typename Math::RowState*>(stages + 4 * Shape::kQueries * D);
  auto* sums = reinterpret_cast<float*>(states + 2 * Shape::kQueries);
  if (args.tile_sum != TileSum::kNone)
    for (int i = thread_index(); i < Shape::kKeys * Shape::kTileSpan; i += Shape::kThreads) sums[i] = 0.0f;
  const int key = work.first_key + 16 * warp_index();
  const int group = static_cast<int>(size.H / size.Hkv);
  const int last_head = work.first_head + static_cast<int>(args.heads) - 1;
  Tile<DKEY ? D : 8> dkey;
  Tile<DVALUE ? D : 8> dvalue;
  for (int b = work.first_batch; b <= work.last_batch; b += static_cast<int>(scores.mask_batch.share_step())) {
    for (int h = work.first_head; h <= last_head; ++h) {
      const int g = h / group;
      if (h == work.first_head || h % group == 0) {
        const LiveKeys live{scores, b, static_cast<int>(size.Nk)};
        const uint32_t rows = k.template live_rows<Shape::kThreads>(work.first_key, live);
        sync_block();
        k.template load<Shape::kThreads>(key_rows<T>(args.call, b, g), work.first_key, rows);
        if (args.dout.data != nullptr) v.template load<Shape::kThreads>(value_rows<T>(args.call, b, g), work.first_key, rows);
        dkey.fill(0.0f);
        dvalue.fill(0.0f);
      }
      float row_sums[2] = {0.0f, 0.0f};
      keys_head<Math, D, DKEY, DVALUE>({args, {b, h}, k, v, dkey, dvalue, row_sums}, work, stages, states, sums);
      if (args.row_out != nullptr) store_row_sums(args, work, {b, h}, key, row_sums);
      const bool finished = (b == work.last_batch && h == last_head) || (args.tile_per_head && args.batches == 1);
      if (args.tile_sum != TileSum::kNone && finished) store_tile_sum<Shape::kQueries, Shape::kWarps>(args, work, {b, h}, sums);
      if ((h + 1) % group != 0) continue;
      if constexpr (DKEY)
        if (args.dkey != nullptr) store_key_gradient(args, dkey, k, args.dkey, b, g, key, size.D, static_cast<float>(scores.scale));
      if constexpr (DVALUE)
        if (args.dvalue != nullptr) store_key_gradient(args, dvalue, v, args.dvalue, b, g, key, size.Dv, args.call.keep_scale);
    }
  }
}

}  // namespace smattn::cuda
