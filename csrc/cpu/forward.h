// Forward, (1)-(4): online softmax over the key blocks, all the heads of a group inside one pass over a mask tile. Where queries are
// few the keys are split as well, and a second pass merges the parts.
#pragma once

#include "cpu/forward_one_pass.h"
#include "cpu/forward_plan.h"
#include "cpu/forward_weights.h"
#include "cpu/tiles/dropout.h"
#include "cpu/tiles/mask.h"
#include "cpu/workers.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class E>
class Forward {
 public:
  using T = SumOf<E>;

  Forward(const ForwardTask<T>& task, const ForwardPlan<E>& plan)
      : t_(task), p_(task.params), s_(p_.scores), n_(s_.size), plan_(plan), query_size_(row_elements<E>(n_.D) * kQueries),
        dout_size_(task.dout.data != nullptr ? row_elements<E>(n_.Dv) * kQueries : 0), queries_(plan.group_heads * query_size_),
        douts_(plan.group_heads * dout_size_), query_rows_(larger_of(query_size_, dout_size_)), part_size_(plan.part_size(n_)),
        parts_((plan.splits == 1 ? plan.group_heads : 1) * part_size_), weights_(task), one_pass_(task),
        masks_(plan.mask_tiles * plan.mask_tile_size), masks_read_(plan.mask_tiles), dmap_(task.eta != nullptr ? kKeys * kQueries : 0),
        keep_(p_.dropout.p > 0 ? kKeys * kQueries : 0), rows_(kLanes<T> * kKeys), keys_(kKeys * row_elements<E>(n_.D)),
        values_(kKeys * row_elements<E>(n_.Dv)), value_steps_memory_(steps_size<E>(kKeys, n_.Dv)) {
    fill<Held>(masks_read_, plan.mask_tiles, Held{});
  }

  int64_t bytes() const {
    return bytes_in(queries_, douts_, query_rows_, parts_, weights_, one_pass_, masks_, masks_read_, dmap_, keep_, rows_, keys_, values_,
                    value_steps_memory_);
  }

  // One item. The result goes to `parts` ([head][part] of this item's query block and split), or to the outputs where there is one split
  // and `parts` is null.
  void run(int64_t b, int64_t group, int64_t query_index, int64_t split, T* parts) {
    const QueryBlock q = query_block(plan_.blocking, query_index);
    const int64_t first = group * plan_.group_heads, heads = smaller_of(plan_.group_heads, n_.H - first);
    T* const memory = plan_.splits == 1 ? parts_.get() : parts + first * part_size_;
    const auto part = [&](int64_t h) { return ForwardPart<E>(memory + h * part_size_, q.lanes, n_.Dv); };
    if (queries_read_.differs(b, group, query_index, 0)) heads_read_ = 0;  // else they are those of the last split
    for (int64_t h = 0; h < heads; ++h) part(h).clear(q.count);
    const int64_t blocks = plan_.blocking.key_blocks, end = blocks * (split + 1) / plan_.splits;
    for (int64_t kb = blocks * split / plan_.splits; kb < end; ++kb) {
      const KeyBlock k = key_block(s_, plan_.blocking, b, kb);
      if (k.attended == 0) continue;
      if (t_.dmap.data != nullptr) read_tile<T>(t_.dmap, b, 0, q, k, rows_, dmap_);
      for (int64_t h = 0; h < heads; ++h) {
        const bool reads_queries = h == heads_read_;
        if (reads_queries) read_head(b, first, h, q);
        const T* mask = s_.mask.data == nullptr ? nullptr : read_mask_tile(b, first + h, query_index, kb, q, k, plan_.mask_tile(h, kb));
        const bool same_keys = h > 0 && kv_head(n_, first + h) == kv_head(n_, first + h - 1);
        const bool last = h == heads - 1;
        const Prefetch keys =
            keys_ahead(s_.key, n_, b, last ? first : first + h + 1, last ? k.first + k.count : k.first, plan_.blocking.keys, n_.D);
        const Prefetch queries = reads_queries && !last ? rows_ahead(s_.query, b, first + h + 1, q.first, q.count, n_.D) : Prefetch{};
        const Prefetch outs = kb == end - 1 && plan_.splits == 1 ? outs_ahead(b, first + h, q) : Prefetch{};
        attend({b, first + h, same_keys, mask, query(h), dout(h), part(h)}, q, k, queries, keys.then(outs));
      }
    }
    for (int64_t h = 0; plan_.splits == 1 && h < heads; ++h) write_part<E>(t_, b, first + h, q, part(h));
  }

  // The splits' parts of one head and query block, `distance` apart, to the outputs.
  void merge(int64_t b, int64_t h, int64_t query_index, T* parts, int64_t distance) {
    const QueryBlock q = query_block(plan_.blocking, query_index);
    const ForwardPart<E> to(parts_, q.lanes, n_.Dv);
    to.clear(q.count);
    merge_parts<E>(p_, q, parts, plan_.splits, distance, to);
    write_part<E>(t_, b, h, q, to);
  }

 private:
  E* query(int64_t h) { return queries_ + h * query_size_; }
  E* dout(int64_t h) { return douts_ + h * dout_size_; }

  // Reads the queries of the group's head h, just before they are needed: by then they have been fetched.
  void read_head(int64_t b, int64_t group_first, int64_t h, const QueryBlock& q) {
    read_queries<E>(s_.query, b, group_first + h, q, n_.D, query_rows_, query(h));
    if (t_.dout.data != nullptr) read_queries<E>(t_.dout, b, group_first + h, q, n_.Dv, query_rows_, dout(h));
    heads_read_ = h + 1;
  }

  // The rows of out that are to be written: a line is fetched even if all of it is overwritten.
  Prefetch outs_ahead(int64_t b, int64_t h, const QueryBlock& q) const {
    if (p_.out == nullptr) return {};
    const int64_t bytes = bytes_of(s_.dtype) * n_.Dv;
    const char* to = static_cast<const char*>(p_.out) + ((b * n_.H + h) * n_.Nq + q.first) * bytes;
    return {{to, to + q.count * bytes - 1}, {}};
  }

  // M's tile, if it is not there from an earlier item.
  const T* read_mask_tile(int64_t b, int64_t h, int64_t query_index, int64_t kb, const QueryBlock& q, const KeyBlock& k, int64_t place) {
    T* tile = masks_ + place * plan_.mask_tile_size;
    const int64_t mask = mask_in_tile(s_, b, k), mask_head = s_.mask_size[1] > 1 ? h : 0;
    if (masks_read_[place].differs(mask, mask_head, query_index, kb)) read_mask<T>(s_, b, h, q, k, rows_, tile);
    return tile;
  }

  // One head, and what it brings to a key block.
  struct Head {
    int64_t b, h;
    bool same_keys;  // the head before read the same keys and values
    const T* mask;  // the tile of M, null where there is none
    const E *query, *dout;
    ForwardPart<E> part;
  };

  // One head against one key block.
  void attend(const Head& head, const QueryBlock& q, const KeyBlock& k, const Prefetch& next_queries, const Prefetch& next_keys) {
    const auto& [b, h, same_keys, mask, query, dout, part] = head;
    if (!same_keys) key_ = read_keys<E>(s_.key, b, kv_head(n_, h), k, n_.D, keys_);
    const Prefetch values_ahead = keys_ahead(p_.value, n_, b, h, k.first, k.count, n_.Dv).then(next_queries);
    if constexpr (OnePass<E>::kServes) {
      const bool tries = p_.out != nullptr && p_.dropout.p == 0 && t_.eta == nullptr;
      if (tries && one_pass_.run({s_, h, mask}, q, k, key_, query, values_ahead, next_keys, part)) {
        if (!same_keys) read_values(b, h, k);
        return product(one_pass_.weights(k), value_steps_, q.count, part.stride / kLanes<T>, packed<E>(k.count),
                       OnePass<E>::has_few_queries(q) ? Prefetch{} : next_keys, AddTo<T>{part.out, part.stride, false});
      }
    }
    T maxima[kQueries];
    copy<T>(part.row(kMaximum), q.lanes, maxima);
    weights_.scores({s_, h, mask}, q, k, key_, query, values_ahead, maxima);
    if (!same_keys) read_values(b, h, k);
    const T* keep = nullptr;
    if (p_.dropout.p > 0) {
      dropout_tile<T>(p_.dropout, b * n_.H + h, q, k, keep_);
      keep = keep_;
    }
    if (t_.dout.data != nullptr) output_gradients(q, k, dout, keep, next_keys);
    T rescale[kQueries];
    weights_.softmax(q, k, t_.wants_mbar() ? mask : nullptr, t_.eta != nullptr ? dmap_.get() : nullptr, maxima, part, rescale);
    if (p_.out == nullptr) return;
    if (keep != nullptr) weights_.drop(q, k, keep);
    product(weights_.by_key(q, k), value_steps_, q.count, part.stride / kLanes<T>, packed<E>(k.count), next_keys,
            [out = part.out, stride = part.stride, factor = &rescale[0]]<int R, int N>(int64_t i, int64_t c, const Vec<T>(&sums)[R][N]) {
#pragma GCC unroll 32
              for (int r = 0; r < R; ++r) {
                T* to = out + (i + r) * stride + c * kLanes<T>;
                for (int v = 0; v < N; ++v, to += kLanes<T>) store(to, fused(load(to), broadcast(factor[i + r]), sums[r][v]));
              }
            });
  }

  // After the scores, when they have been fetched.
  void read_values(int64_t b, int64_t h, const KeyBlock& k) {
    value_ = read_keys<E>(p_.value, b, kv_head(n_, h), k, n_.Dv, values_, kLanes<E>);
    value_steps_ = by_step(value_, k.count, n_.Dv, value_steps_memory_.get());
  }

  // dP (6), to be averaged; a padded key's is 0, for of a large value it may be infinite.
  void output_gradients(const QueryBlock& q, const KeyBlock& k, const E* dout, const T* keep, const Prefetch& ahead) {
    dot_products(value_, dout, q, k.count, n_.Dv, ahead, dmap_.get());
    const int64_t size = keep == nullptr ? 0 : k.count * q.lanes;
    for (int64_t at = 0; at < size; at += kLanes<T>) store(dmap_ + at, load(dmap_ + at) * load(keep + at));
    clear_padded(k, q.lanes, dmap_.get());
  }

  const ForwardTask<T>& t_;
  const ForwardParams& p_;
  const Scores& s_;
  const Sizes& n_;
  const ForwardPlan<E>& plan_;
  const int64_t query_size_, dout_size_;
  Buffer<E> queries_, douts_;  // [head of the group], as read_queries leaves them
  Buffer<E> query_rows_;
  const int64_t part_size_;
  Buffer<T> parts_;    // [head of the group], where there is one split; else one, to merge into
  ForwardWeights<E> weights_;
  OnePass<E> one_pass_;
  Buffer<T> masks_;    // [key][lane] of each tile that is kept
  Buffer<Held> masks_read_;
  Buffer<T> dmap_;     // [key][lane], dA or dP
  Buffer<T> keep_;     // [key][lane], C/(1-p)
  Buffer<T> rows_;
  Buffer<E> keys_, values_;  // copies of those that cannot be read as they lie
  Buffer<E> value_steps_memory_;
  RowMajor<E> key_{}, value_{};
  Vectors<E> value_steps_{};
  Held queries_read_;
  int64_t heads_read_ = 0;  // of the group
};

template <class E, class T>
inline void forward_pass(const ForwardTask<T>& task, ParallelFor threads) {
  const Sizes& n = task.params.scores.size;
  const ForwardPlan<E> plan(task.params.scores, threads.count);
  const int64_t query_blocks = plan.blocking.query_blocks;
  const int64_t per_query_block = n.H * plan.part_size(n);  // parts of one (split, batch, query block)
  const int64_t per_split = n.B * query_blocks * per_query_block;
  const Buffer<T> parts(plan.splits > 1 ? plan.splits * per_split : 0);
  const auto make = [&] { return Forward<E>(task, plan); };
  const int64_t spare = kSpareBytes - parts.bytes();
  for_each_item(threads, plan.items(), spare, make, [&](Forward<E>& forward, int64_t number) {
    const auto [b, group, qb, split] = plan.item(number);
    T* const to = plan.splits == 1 ? nullptr : parts + split * per_split + (b * query_blocks + qb) * per_query_block;
    forward.run(b, group, qb, split, to);
  });
  if (plan.splits == 1) return;
  for_each_item(threads, n.B * query_blocks * n.H, spare, make, [&](Forward<E>& forward, int64_t item) {
    const int64_t h = item % n.H, qb = item / n.H % query_blocks, b = item / (n.H * query_blocks);
    forward.merge(b, h, qb, parts + item * plan.part_size(n), per_split);
  });
}

template <class E>
inline void forward_of(const ForwardParams& params, ParallelFor threads) {
  forward_pass<E>(ForwardTask<SumOf<E>>{.params = params}, threads);
}

}  // namespace smattn::cpu::SMATTN_UNIT
