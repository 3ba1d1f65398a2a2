// The attention map (9) where memory holds the weights of a query block over all keys: every score is made once.
#pragma once

#include "cpu/forward_part.h"
#include "cpu/tiles/mask.h"
#include "cpu/tiles/weights.h"
#include "cpu/workers.h"

namespace smattn::cpu::SMATTN_UNIT {

// Items are (batch element, query block, group of heads). Each leaves its heads' share of the map, [key][lane], and the shares of a block's
// groups are then added up in order. How the heads are grouped depends on the shape alone.
template <class T>
struct MapPlan {
  Blocking<T> blocking;
  int64_t size;                 // of a share
  int64_t group_heads, groups;
  int64_t blocks, round;        // (batch element, query block)s, and how many of them have their shares at a time

  explicit MapPlan(const Sizes& n)
      : blocking(n), size(blocking.key_blocks * round_up(blocking.keys, kLanes<T>) * blocking.queries),
        blocks(n.B * blocking.query_blocks) {
    constexpr int64_t kItems = 16, kShareBytes = kPromisedBytes / 4;
    group_heads = blocks_of(n.H, smaller_of(n.H, blocks_of(kItems, larger_of<int64_t>(1, blocks))));
    groups = blocks_of(n.H, group_heads);
    round = kShareBytes / larger_of<int64_t>(1, groups * bytes());
  }

  int64_t bytes() const { return size * static_cast<int64_t>(sizeof(T)); }
  bool serves() const {
    constexpr int64_t kWeightBytes = 320 << 10;  // what a core's cache holds beside keys
    return bytes() <= kWeightBytes && round > 0;
  }
};

template <class T>
class MapRows {
 public:
  MapRows(const MapParams& params, const MapPlan<T>& plan)
      : s_(params.scores), n_(s_.size), head_weights_(static_cast<const T*>(params.head_weights)), plan_(plan),
        query_(kQueries * round_up(n_.D, kLanes<T>)), query_rows_(kQueries * round_up(n_.D, kLanes<T>)),
        keys_(kKeys * round_up(n_.D, kLanes<T>)), rows_(kLanes<T> * kKeys), part_(ForwardPart<T>::size({}, plan.blocking.queries)),
        masks_(s_.mask.data != nullptr ? plan.size : 0), masks_read_(plan.blocking.key_blocks), weights_(plan.size) {
    softmax_.params.scores = s_;
    softmax_.params.lse = params.lse, softmax_.params.normalizer = params.normalizer;
    fill<Held>(masks_read_, plan.blocking.key_blocks, Held{});
  }

  int64_t bytes() const { return bytes_in(query_, query_rows_, keys_, rows_, part_, masks_, masks_read_, weights_); }

  // One item: stores its share, and the rows of its heads' softmax.
  void run(int64_t b, int64_t query_index, int64_t group, T* share) {
    const QueryBlock q = query_block(plan_.blocking, query_index);
    const ForwardPart<T> part(part_, q.lanes, 0);
    const int64_t first = group * plan_.group_heads, end = smaller_of(first + plan_.group_heads, n_.H);
    for (int64_t h = first; h < end; ++h) {
      weigh(b, h, query_index, q, part);
      write_part<T>(softmax_, b, h, q, part);
      add(b, h, q, part, h == first, share);
    }
  }

 private:
  // The weights of one head, not yet divided by their sums, which go to the part.
  void weigh(int64_t b, int64_t h, int64_t query_index, const QueryBlock& q, const ForwardPart<T>& part) {
    read_queries<T>(s_.query, b, h, q, n_.D, query_rows_, query_);
    part.clear();
    T* maxima = part.row(kMaximum);
    for (int64_t kb = 0; kb < plan_.blocking.key_blocks; ++kb) {
      const KeyBlock k = key_block(s_, plan_.blocking, b, kb);
      T* tile = weights_ + k.first * q.lanes;
      if (k.attended == 0) {
        fill<T>(tile, k.count * q.lanes, static_cast<T>(-__builtin_inf()));
        continue;
      }
      const T* mask = s_.mask.data == nullptr ? nullptr : read_mask_tile(b, h, query_index, kb, q, k);
      const RowMajor<T> key = read_keys<T>(s_.key, b, kv_head(n_, h), k, n_.D, keys_);
      const Prefetch next = keys_ahead(s_.key, n_, b, h, k.first + k.count, plan_.blocking.keys, n_.D);
      exponents_of(Exponents<T>(s_, h, mask), q, k, key, query_.get(), n_.D, next, maxima, tile);
    }
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      Weighing<T> w{.scores = weights_ + lane,
                    .mask = nullptr,
                    .dmap = nullptr,
                    .weights = weights_ + lane,
                    .stride = q.lanes,
                    .keys = n_.Nk,
                    .subtracted = finite_maximum<T>(load(maxima + lane))};
      w.run();
      store(part.row(kSum) + lane, w.sum);
    }
  }

  // Adds the head's probabilities times its weight. A padded key's are 0, whatever the sum.
  void add(int64_t b, int64_t h, const QueryBlock& q, const ForwardPart<T>& part, bool is_first, T* share) const {
    T factor[kQueries];
    for (int64_t i = 0; i < q.lanes; ++i) {
      T normalizer[2];
      store_normalizer(normalizer, !is_dead(part.row(kMaximum)[i], part.row(kSum)[i]), part.row(kMaximum)[i], part.row(kSum)[i]);
      factor[i] = head_weights_[h] * normalizer[1];
    }
    if (is_first) fill<T>(share, n_.Nk * q.lanes, T(0));
    for (int64_t kb = 0; kb < plan_.blocking.key_blocks; ++kb) {
      const KeyBlock k = key_block(s_, plan_.blocking, b, kb);
      for (int64_t j = 0; j < k.count; ++j) {
        const int64_t key = (k.first + j) * q.lanes;
        for (int64_t at = key; at < key + q.lanes && !k.padded[j]; at += kLanes<T>) {
          store(share + at, fused(load(factor + at - key), load(weights_ + at), load(share + at)));
        }
      }
    }
  }

  // M's tile, if it is not there from the head before.
  const T* read_mask_tile(int64_t b, int64_t h, int64_t query_index, int64_t kb, const QueryBlock& q, const KeyBlock& k) {
    T* tile = masks_ + kb * (plan_.size / plan_.blocking.key_blocks);
    const int64_t mask = mask_in_tile(s_, b, k), mask_head = s_.mask_size[1] > 1 ? h : 0;
    if (masks_read_[kb].differs(mask, mask_head, query_index, kb)) read_mask<T>(s_, b, h, q, k, rows_, tile);
    return tile;
  }

  const Scores& s_;
  const Sizes& n_;
  const T* head_weights_;
  const MapPlan<T>& plan_;
  ForwardTask<T> softmax_{.params = {}};  // of a value without columns: the rows alone
  Buffer<T> query_, query_rows_, keys_, rows_, part_;
  Buffer<T> masks_;  // [key block][key][lane]
  Buffer<Held> masks_read_;
  Buffer<T> weights_;  // [key][lane], the exponents first
};

// Adds up the shares of a block's groups for the keys of a key block, and stores them.
template <class T>
inline void store_map(const MapParams& p, const MapPlan<T>& plan, int64_t block, int64_t key_index, const T* shares, T* tile, T* rows) {
  const Sizes& n = p.scores.size;
  const int64_t b = block / plan.blocking.query_blocks;
  const QueryBlock q = query_block(plan.blocking, block % plan.blocking.query_blocks);
  const KeyBlock k = key_block(p.scores, plan.blocking, b, key_index);
  copy<T>(shares + k.first * q.lanes, k.count * q.lanes, tile);
  for (int64_t group = 1; group < plan.groups; ++group) {
    const T* share = shares + group * plan.size + k.first * q.lanes;
    for (int64_t at = 0; at < k.count * q.lanes; at += kLanes<T>) store(tile + at, load(tile + at) + load(share + at));
  }
  const int64_t stride = round_up(k.count, kLanes<T>);
  transpose_block<T>(tile, q.lanes, stride, q.lanes, rows, stride);
  write_rows<T>(rows, stride, q.count, k.count, p.map, kStored<T>, (b * n.Nq + q.first) * n.Nk + k.first, n.Nk);
}

template <class T>
inline void map_by_rows(const MapParams& p, const MapPlan<T>& plan, ParallelFor threads) {
  const int64_t per_block = plan.groups * plan.size, key_blocks = plan.blocking.key_blocks;
  const Buffer<T> shares(smaller_of(plan.round, plan.blocks) * per_block);
  const auto make = [&] { return MapRows<T>(p, plan); };
  for (int64_t first = 0; first < plan.blocks; first += plan.round) {
    const int64_t blocks = smaller_of(plan.round, plan.blocks - first);
    for_each_item(threads, blocks * plan.groups, kSpareBytes - shares.bytes(), make, [&](MapRows<T>& rows, int64_t item) {
      const int64_t block = first + item / plan.groups, query_blocks = plan.blocking.query_blocks;
      rows.run(block / query_blocks, block % query_blocks, item % plan.groups, shares + item * plan.size);
    });
    parallel_for(threads, blocks * key_blocks, 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> tile(kKeys * kQueries), rows(kKeys * kQueries);
      for (int64_t item = begin; item < end; ++item) {
        store_map<T>(p, plan, first + item / key_blocks, item % key_blocks, shares + item / key_blocks * per_block, tile, rows);
      }
    });
  }
}

}  // namespace smattn::cpu::SMATTN_UNIT
