// The attention map (9) and its backward (10), on the tiles of forward and backward.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/map_rows.h"
#include "cpu/workers.h"

namespace smattn::cpu::SMATTN_UNIT {

// One item of (9): a (query block, key block) tile of the map.
template <class T>
class MapTile {
 public:
  explicit MapTile(const MapParams& params)
      : p_(params), s_(params.scores), n_(s_.size), query_(kQueries * round_up(n_.D, kLanes<T>)), keys_(kKeys * round_up(n_.D, kLanes<T>)),
        rows_(kQueries * larger_of(kKeys, round_up(n_.D, kLanes<T>))), mask_(kKeys * kQueries), scores_(kKeys * kQueries),
        sum_(kKeys * kQueries) {}

  int64_t bytes() const { return bytes_in(query_, keys_, rows_, mask_, scores_, sum_); }

  void run(int64_t b, const QueryBlock& q, const KeyBlock& k) {
    fill<T>(sum_, kKeys * q.lanes, T(0));
    for (int64_t h = 0; h < n_.H && k.attended > 0; ++h) add_head(b, h, q, k);
    store_map_tile<T>(p_, b, q, k, sum_, rows_);
  }

 private:
  void add_head(int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k) {
    const T* mask = s_.mask.data != nullptr ? mask_.get() : nullptr;
    if (mask != nullptr && (h == 0 || s_.mask_size[1] > 1)) read_mask<T>(s_, b, h, q, k, rows_, mask_);
    read_queries<T>(s_.query, b, h, q, n_.D, rows_, query_);
    T memory[RowExponents<T>::kRows * kQueries];
    const auto rows = RowExponents<T>::on(memory, q.lanes);
    rows.read(static_cast<const T*>(p_.lse), static_cast<const T*>(p_.normalizer), (b * n_.H + h) * n_.Nq + q.first, q.count, q.lanes,
              n_.Nk);
    const T weight = static_cast<const T*>(p_.head_weights)[h];
    const RowMajor<T> key = read_keys<T>(s_.key, b, kv_head(n_, h), k, n_.D, keys_);
    dot_products(key, query_.get(), q, k.count, n_.D, Prefetch{}, scores_.get());
    const Exponents<T> exponent(s_, h, mask);
    for (int64_t j = 0; j < k.count; ++j) {
      for (int64_t lane = 0; lane < q.lanes && !k.padded[j]; lane += kLanes<T>) {
        const int64_t at = j * q.lanes + lane;
        const Vec<T> x = exponent(load(scores_ + at), at, load(rows.rest + lane));
        const Vec<T> lowest = load(rows.lowest + lane) + (kLowestInMap<T> - Exp2<T>::kLowest);
        const Vec<T> p = exp2<T>(x, lowest, load(rows.highest + lane)) * load(rows.factor + lane);
        store(sum_ + at, fused(broadcast(weight), p, load(sum_ + at)));
      }
    }
  }

  const MapParams& p_;
  const Scores& s_;
  const Sizes& n_;
  Buffer<T> query_, keys_, rows_, mask_, scores_, sum_;
};

template <class T>
inline void attention_map_of(const MapParams& p, ParallelFor threads) {
  const Sizes& n = p.scores.size;
  const MapPlan<T> plan(n);
  if (plan.serves()) return map_by_rows<T>(p, plan, threads);
  forward_of<T>(softmax_of(p), threads);
  const Blocking<T> blocking(n);
  const int64_t tiles = n.B * blocking.query_blocks * blocking.key_blocks;
  const auto make = [&] { return MapTile<T>(p); };
  for_each_item(threads, tiles, kSpareBytes, make, [&](MapTile<T>& tile, int64_t item) {
    const int64_t kb = item % blocking.key_blocks, qb = item / blocking.key_blocks % blocking.query_blocks;
    const int64_t b = item / (blocking.key_blocks * blocking.query_blocks);
    tile.run(b, query_block(blocking, qb), key_block(p.scores, blocking, b, kb));
  });
}

// The weights of a round of backward's groups, and the rows' eta and mbar. bytes: for workers.
template <class T>
inline void keep_weights(const ForwardTask<T>& means, const BackwardPlan<T>& plan, const MapWeights<T>& weights, int64_t first,
                         int64_t groups, int64_t bytes, ParallelFor threads) {
  const int64_t splits = weights.shape.splits, heads = weights.shape.heads, query_blocks = plan.blocking.query_blocks;
  const auto batch = [&](int64_t slot) { return plan.batch_at(plan.first_place(first + slot / query_blocks)); };
  const auto first_head = [&](int64_t slot) { return plan.first_kv_head(first + slot / query_blocks) * (plan.n.H / plan.n.Hkv); };
  const auto make = [&] { return MapWorker<T>(means, weights); };
  for_each_item(threads, groups * query_blocks * splits, bytes, make, [&](MapWorker<T>& worker, int64_t item) {
    const int64_t slot = item / splits;
    worker.run(batch(slot), slot % query_blocks, slot, item % splits, first_head(slot), heads);
  });
  parallel_for(threads, groups * query_blocks * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t slot = place / heads;
      merge_rows<T>(means, weights, batch(slot), first_head(slot) + place % heads, slot % query_blocks, place);
    }
  });
}

template <class T>
inline void attention_map_backward_of(const MapBackwardParams& p, ParallelFor threads) {
  const Sizes& n = p.scores.size;
  const int64_t rows = n.B * n.H * n.Nq;
  const Buffer<T> eta(rows), mbar(p.dalpha != nullptr ? rows : 0);
  ForwardTask<T> means{.params = {}, .dmap = p.dmap, .eta = eta};  // of a value without columns: eta, and mbar for dalpha
  means.params.scores = p.scores;
  means.params.scores.size.Dv = 0;
  means.params.mbar = p.dalpha != nullptr ? mbar.get() : nullptr;
  BackwardTask<T> task{};
  task.scores = means.params.scores;
  task.dmap = p.dmap;
  task.head_weights = static_cast<const T*>(p.head_weights);
  task.lse = static_cast<const T*>(p.lse), task.normalizer = static_cast<const T*>(p.normalizer);
  task.delta = eta;
  task.mbar = static_cast<const T*>(means.params.mbar);
  task.dquery = p.dquery, task.dkey = p.dkey, task.dmask = p.dmask;
  task.dalpha = static_cast<T*>(p.dalpha);
  if (task.wants_ds() && !is_empty(n)) {
    const BackwardPlan<T> plan(task);
    if (!plan.keeps_weights()) forward_pass<T>(means, threads);
    backward_pass<T>(task, plan, threads, [&](const BackwardParts<T>& parts, int64_t first, int64_t groups, int64_t bytes) {
      if (plan.keeps_weights()) keep_weights<T>(means, plan, parts.weights, first, groups, bytes, threads);
    });
  } else {
    forward_pass<T>(means, threads);
    store_zeros(task);  // of an empty call; else none is wanted
  }
  if (p.dhead_weights == nullptr) return;
  for (int64_t h = 0; h < n.H; ++h) {
    T sum = 0;
    for (int64_t b = 0; b < n.B; ++b) {
      for (int64_t i = 0; i < n.Nq; ++i) sum += eta[(b * n.H + h) * n.Nq + i];
    }
    static_cast<T*>(p.dhead_weights)[h] = sum;
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
