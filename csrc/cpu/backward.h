// Backward, (5)-(8): P is rebuilt from lse, tile by tile; see backward_plan.h for who sums what.
#pragma once

#include "cpu/backward_delta.h"
#include "cpu/backward_reduce.h"
#include "cpu/backward_step.h"
#include "cpu/runs.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class E>
class Backward {
 public:
  using T = typename SumOf<E>::type;

  Backward(const BackwardTask<T>& task, const BackwardPlan<T>& plan, BackwardParts<T>& parts)
      : t_(task), n_(plan.n), plan_(plan), parts_(parts), pairs_(plan.pairs), tiles_(tile_slots()),
        tile_memory_(tile_slots() * QueryTiles<E>::size(n_, plan.blocking.queries)), step_(task),
        row_memory_(plan.in_runs ? 0 : plan.row_size()), dquery_(plan.dquery_at_once() ? plan.dquery_size() : 0),
        dmask_(plan.dmask_tiles() * kKeys * kQueries), mask_(kKeys * kQueries), dmap_(task.dmap.data != nullptr ? kKeys * kQueries : 0),
        rows_(step_.scratch()), keys_(kKeys * row_elements<E>(n_.D)), values_(kKeys * row_elements<E>(n_.Dv)),
        key_steps_memory_(steps_size<E>(kKeys, n_.D)), row_(row_memory_) {
    const int64_t size = QueryTiles<E>::size(n_, plan.blocking.queries);
    for (int64_t i = 0; i < tile_slots(); ++i) tiles_[i].place(n_, plan.blocking.queries, tile_memory_ + i * size);
  }

  int64_t bytes() const {
    return bytes_in(pairs_, tiles_, tile_memory_, step_, row_memory_, dquery_, dmask_, mask_, dmap_, keys_, values_, key_steps_memory_);
  }

  // All of an item. slot: the group's place in its round.
  void run(int64_t group, int64_t slot, int64_t split) {
    begin_group(group, slot);
    for (int64_t o = plan_.first_outer(split); o < plan_.first_outer(split + 1); ++o) {
      const int64_t inner = plan_.inner_blocks(), visits = inner * plan_.pairs;
      for (int64_t v = 0; v < visits; ++v) {
        plan_.pairs_innermost ? visit(split, o, v / plan_.pairs, v % plan_.pairs) : visit(split, o, v % inner, v / inner);
      }
    }
    drain();
  }

  // One run of an item.
  void run(int64_t group, int64_t slot, int64_t split, int64_t o, const Run& run, Runs& runs) {
    begin_group(group, slot);
    row_ = parts_.rows + runs.slot(run) * plan_.row_size();
    for (int64_t pair = 0; pair < plan_.pairs; ++pair) {
      runs.wait(run, pairs_[pair].end_of_kv);
      visit(split, o, run.index, pair);
      runs.finish(run, pair + 1);
    }
    drain();
  }

 private:
  void begin_group(int64_t group, int64_t slot) {
    for (int64_t pair = 0; pair < plan_.pairs; ++pair) pairs_[pair] = plan_.pair(group, pair);
    slot_ = slot;
    begins_dmask_ = !plan_.adds_up_dmask() || plan_.turn(group) == 0;
    ends_dmask_ = !plan_.adds_up_dmask() || (plan_.shares == 1 && plan_.turn(group) == plan_.turns - 1);
    dmask_total_ = parts_.dmask_total + plan_.share(group) * plan_.dmask_tiles_size(t_.scores.mask_size);
  }

  void visit(int64_t split, int64_t o, int64_t i, int64_t pair_index) {
    const Pair& pair = pairs_[pair_index];
    const int64_t kb = plan_.outer_keys ? o : i, qb = plan_.outer_keys ? i : o, g = kv_head(n_, pair.h);
    const QueryBlock q = query_block(plan_.blocking, qb);
    if (block_read_.differs(t_.scores.padding == nullptr ? 0 : pair.b, kb, 0, 0)) k_ = key_block(t_.scores, plan_.blocking, pair.b, kb);
    const KeyBlock& k = k_;
    const Sums<T> sums = begin(split, o, i, pair_index, kb, qb);
    if (k.attended > 0) {
      QueryTiles<E>& tiles = tiles_[tile_slots() == 1 ? 0 : pair_index];
      tiles.read(t_, pair.b, pair.h, q);
      const T* mask = read_inputs(pair, g, kb, qb, q, k);
      step_.run(pair.h, q, k, tiles, keys_read_, mask, t_.dmap.data != nullptr ? dmap_.get() : nullptr, ahead(pair_index, i, k), sums);
    } else {
      if (sums.dmask != nullptr && sums.dmask_is_new) fill<T>(sums.dmask, k.count * q.lanes, T(0));
      if (sums.dkv_is_new) fill<T>(dkv_of(split, pair, kb), plan_.dkv_size(), T(0));
    }
    if (sums.dmask != nullptr) finish_dmask(split, pair_index, q, k, sums.dmask);
    const bool last_inner = i == plan_.inner_blocks() - 1;
    if (plan_.outer_keys && last_inner && pair.last_of_kv && wants_dkv() && !stored_directly(pair, i, k)) {
      store_dkv<T>(t_, pair.b, g, k, plan_.blocking.keys, dkv_of(split, pair, kb));
    }
    const bool has_dquery = plan_.outer_keys ? plan_.dquery_at_once() : last_inner;
    if (has_dquery && t_.dquery != nullptr) store_dquery<T>(t_, pair.b, pair.h, q, sums.dquery);
    if (sums.dalpha != nullptr && last_inner) {
      Vec<T> sum{};
      for (int64_t lane = 0; lane < plan_.blocking.queries; lane += kLanes<T>) sum += load(sums.dalpha + lane);
      parts_.dalpha[o * parts_.dalpha_size + pair.b * n_.H + pair.h] = sum_lanes<T>(sum);
    }
  }

  // This visit's values and the next one's keys, where they are not those of the visit before, and the next one's queries.
  StepPrefetch ahead(int64_t pair_index, int64_t i, const KeyBlock& k) const {
    if (!plan_.outer_keys) return {};
    const int64_t inner = plan_.inner_blocks();
    const bool pairs_turn = inner == 1 || plan_.pairs_innermost, last_pair = pair_index == plan_.pairs - 1, last_inner = i == inner - 1;
    const bool same_pair_next = !pairs_turn && !last_inner;
    const Pair& pair = pairs_[pair_index];
    const Pair& next = same_pair_next ? pair : pairs_[last_pair ? 0 : pair_index + 1];
    const bool with_value = t_.value.data != nullptr;
    StepPrefetch ahead;
    if (with_value && (pairs_turn || i == 0)) ahead.values = keys_ahead(t_.value, n_, pair.b, pair.h, k.first, k.count, n_.Dv);
    if (!same_pair_next) {
      const int64_t first = last_pair && last_inner ? k.first + k.count : k.first;
      ahead.next_keys = keys_ahead(t_.scores.key, n_, next.b, next.h, first, plan_.blocking.keys, n_.D);
    }
    if (tile_slots() == 1) {
      const QueryBlock q = query_block(plan_.blocking, (pairs_turn && !last_pair ? i : i + 1) % inner);
      ahead.next_queries = rows_ahead(t_.scores.query, next.b, next.h, q.first, q.count, n_.D);
      if (with_value) ahead.next_douts = rows_ahead(t_.dout, next.b, next.h, q.first, q.count, n_.Dv);
    }
    return ahead;
  }

  // Whether dK and dV are complete with this visit, of inner block i, and can be written where they belong, as they come.
  bool stored_directly(const Pair& pair, int64_t i, const KeyBlock& k) const {
    return plan_.outer_keys && i == plan_.inner_blocks() - 1 && pair.last_of_kv && k.attended == k.count && t_.scores.dtype == kStored<E> &&
           n_.D % kLanes<T> == 0 && n_.Dv % kLanes<T> == 0 && is_aligned(t_.dkey) && is_aligned(t_.dvalue);
  }
  static bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }
  // Where queries are few their tiles are kept for the next key block, as far as a core's cache holds those of all pairs.
  int64_t tile_slots() const {
    constexpr int64_t kTilesBytes = 1 << 20;
    const int64_t bytes = plan_.pairs * QueryTiles<E>::size(n_, plan_.blocking.queries) * static_cast<int64_t>(sizeof(E));
    return plan_.outer_keys && plan_.outer_blocks() > 1 && plan_.inner_blocks() == 1 && bytes <= kTilesBytes ? plan_.pairs : 1;
  }
  bool wants_dkv() const { return t_.dkey != nullptr || t_.dvalue != nullptr; }
  T* dkv_of(int64_t split, const Pair& pair, int64_t kb) const {
    if (plan_.outer_keys) return row_ + (plan_.pairs_innermost ? pair.kv : 0) * plan_.dkv_size();
    return own_part(split) + (pair.kv * plan_.blocking.key_blocks + kb) * plan_.dkv_size();
  }
  T* dquery_of(int64_t split, int64_t pair, int64_t qb) const {
    if (plan_.dquery_at_once()) return dquery_;
    if (!plan_.outer_keys) return row_ + (plan_.pairs_innermost ? pair : 0) * plan_.dquery_size();
    return own_part(split) + (pair * plan_.blocking.query_blocks + qb) * plan_.dquery_size();
  }

  // Where this visit's sums go, those that begin with it cleared.
  Sums<T> begin(int64_t split, int64_t o, int64_t i, int64_t pair_index, int64_t kb, int64_t qb) {
    const Pair& pair = pairs_[pair_index];
    const int64_t g = kv_head(n_, pair.h);
    T *dkv = dkv_of(split, pair, kb), *dquery = dquery_of(split, pair_index, qb);
    T* dalpha = row_ + plan_.sums_size() + pair_index * plan_.blocking.queries;
    if (i == 0) fill<T>(dalpha, plan_.blocking.queries, T(0));
    const bool first_outer = o == plan_.first_outer(split);
    if (t_.dquery != nullptr && (plan_.outer_keys ? first_outer : i == 0)) fill<T>(dquery, plan_.dquery_size(), T(0));
    if (wants_dkv() && !plan_.outer_keys && first_outer && pair.first_of_kv) fill<T>(dkv, plan_.dkv_size(), T(0));
    const bool tile = plan_.tile_dmask, direct = stored_directly(pair, i, k_);
    const int64_t row = (pair.b * n_.Hkv + g) * n_.Nk + k_.first;
    const int64_t bytes = bytes_of(t_.scores.dtype);
    const auto place = [&](void* gradient, int64_t size) { return direct ? static_cast<char*>(gradient) + row * size * bytes : nullptr; };
    T* dmask = t_.dmask == nullptr ? nullptr : dmask_ + (tile && !plan_.pairs_innermost ? i * kKeys * kQueries : 0);
    if (tile && pair.first_of_mask && !begins_dmask_) {
      const QueryBlock q = query_block(plan_.blocking, qb);
      copy<T>(dmask_total_ + plan_.dmask_tile(pair.h, q, k_), k_.count * q.lanes, dmask);
    }
    return {.dquery = t_.dquery != nullptr ? dquery : nullptr,
            .dkey = t_.dkey != nullptr ? dkv : nullptr,
            .dvalue = t_.dvalue != nullptr ? dkv + plan_.blocking.keys * round_up(n_.D, kLanes<T>) : nullptr,
            .dkv_is_new = plan_.outer_keys && i == 0 && pair.first_of_kv,
            .final_dkey = place(t_.dkey, n_.D),
            .final_dvalue = place(t_.dvalue, n_.Dv),
            .dmask = dmask,
            .dmask_is_new = !tile || (pair.first_of_mask && begins_dmask_),
            .dalpha = t_.dalpha != nullptr ? dalpha : nullptr};
  }

  // Fills the tiles of this visit, those that are not there from the last one; returns M's.
  const T* read_inputs(const Pair& pair, int64_t g, int64_t kb, int64_t qb, const QueryBlock& q, const KeyBlock& k) {
    if (kv_read_.differs(pair.b, g, kb, 0)) {
      keys_read_.key = read_keys<E>(t_.scores.key, pair.b, g, k, n_.D, keys_, kLanes<E>);
      if (t_.dquery != nullptr) keys_read_.key_steps = by_step(keys_read_.key, k.count, n_.D, key_steps_memory_.get());
      if (t_.value.data != nullptr) keys_read_.value = read_keys<E>(t_.value, pair.b, g, k, n_.Dv, values_);
    }
    if (t_.dmap.data != nullptr && dmap_read_.differs(pair.b, 0, kb, qb)) read_tile<T>(t_.dmap, pair.b, 0, q, k, rows_, dmap_);
    if (t_.scores.mask.data == nullptr) return nullptr;
    const int64_t mask = t_.scores.padding == nullptr ? t_.scores.mask_batch.mask_of(pair.b) : pair.b;  // each batch selects its own out
    if (mask_read_.differs(mask, t_.scores.mask_size[1] == 1 ? 0 : pair.h, kb, qb)) {
      read_mask<T>(t_.scores, pair.b, pair.h, q, k, rows_, mask_);
    }
    return mask_;
  }

  void finish_dmask(int64_t split, int64_t pair_index, const QueryBlock& q, const KeyBlock& k, const T* tile) {
    const Pair& pair = pairs_[pair_index];
    if (!plan_.tile_dmask) {
      const int64_t own = plan_.dmask_rows > 1 ? pair_index : 0;
      T* row = parts_.dmask + (plan_.outer_keys ? 0 : split) * parts_.dmask_size + (slot_ * plan_.dmask_rows + own) * n_.Nk + k.first;
      const int64_t first_block = plan_.outer_keys ? 0 : plan_.outer_blocks() * split / plan_.splits;
      const bool first = q.first == query_block(plan_.blocking, first_block).first && own == pair_index;
      for (int64_t j = 0; j < k.count; ++j) {
        Vec<T> sum{};
        for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) sum += load(tile + j * q.lanes + lane);
        row[j] = (first ? T(0) : row[j]) + sum_lanes<T>(sum);
      }
      return;
    }
    if (!pair.last_of_mask) return;
    if (!ends_dmask_) return copy<T>(tile, k.count * q.lanes, dmask_total_ + plan_.dmask_tile(pair.h, q, k));
    store_dmask_tile<T>(t_, t_.scores.mask_batch.mask_of(pair.b), pair.h, q, k, tile, rows_);
  }

  T* own_part(int64_t split) const { return parts_.sums + split * parts_.sums_size + slot_ * (parts_.sums_size / plan_.round); }

  const BackwardTask<T>& t_;
  const Sizes& n_;
  const BackwardPlan<T>& plan_;
  BackwardParts<T>& parts_;
  Buffer<Pair> pairs_;
  Buffer<QueryTiles<E>> tiles_;
  Buffer<E> tile_memory_;
  BackwardStep<E> step_;
  Buffer<T> row_memory_;
  Buffer<T> dquery_;  // of a visit
  Buffer<T> dmask_;   // [inner block or one][key][lane]
  Buffer<T> mask_, dmap_;
  T* rows_;  // [kQueries][kKeys], for what is turned
  Buffer<E> keys_, values_, key_steps_memory_;
  KeyTiles<E> keys_read_{};
  KeyBlock k_;
  int64_t slot_ = 0;
  bool begins_dmask_ = true, ends_dmask_ = true;  // among the groups that add to one dM
  T* dmask_total_ = nullptr;  // that dM
  Held block_read_, kv_read_, mask_read_, dmap_read_;
  T* row_;  // of the outer block at hand: [slot][dK, dV] or [slot][dQ], then dalpha's [pair][lane]
};

// The groups of a round by a plan in runs.
template <class T, class Make>
inline void in_runs(const BackwardPlan<T>& plan, int64_t first, int64_t groups, ParallelFor threads, int64_t bytes, const Make& make) {
  const int64_t chains = groups * plan.splits;
  Runs runs(chains, groups * plan.outer_blocks(), plan.inner_blocks(), plan.pairs, plan.row_slots);
  share_out<Run>(
      threads, runs.count(), bytes, [&](Run& run) { return runs.take(run); }, make,
      [&](auto& backward, const Run& run) {
        const int64_t slot = run.row % groups,
                      split = plan.splits - 1 - run.row % chains / groups;  // of two splits the second may be longer
        backward.run(first + slot, slot, split, plan.first_outer(split) + run.row / chains, run, runs);
      });
}

// (6)-(8), once delta is there.
template <class E, class T>
inline void backward_pass(const BackwardTask<T>& task, const T* dlse, ParallelFor threads) {
  if (task.scores.size.B == 0 || task.scores.size.Nq == 0 || task.scores.size.Nk == 0) return store_zeros(task);
  const BackwardPlan<T> plan(task);
  BackwardParts<T> parts(task, plan);
  const auto make = [&] { return Backward<E>(task, plan, parts); };
  const int64_t spare = plan.memory.for_workers(parts.bytes());
  for (int64_t first = 0; first < plan.groups; first += plan.round) {
    const int64_t groups = smaller_of(plan.round, plan.groups - first);
    if (plan.in_runs) {
      in_runs(plan, first, groups, threads, spare, make);
    } else {
      for_each_item(threads, groups * plan.splits, spare, make, [&](Backward<E>& backward, int64_t item) {
        backward.run(first + item / plan.splits, item / plan.splits, item % plan.splits);
      });
    }
    if (plan.dmask_rows > 0) store_key_dmask(task, plan, parts, first, groups, threads);
    if (plan.shares > 1 && plan.mask_of(first + groups) > plan.mask_of(first))
      store_shares(task, plan, parts, plan.mask_of(first), threads);
    if (!plan.wants_parts) continue;
    parallel_for(threads, plan.part_items() / plan.round * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) store_sum(task, plan, parts, first, item);
    });
  }
  if (task.dalpha != nullptr) store_dalpha(task, plan, parts, dlse);
}

template <class E>
inline void backward_of(const BackwardParams& p, ParallelFor threads) {
  using T = typename SumOf<E>::type;
  const Sizes& n = p.scores.size;
  const auto* lse = static_cast<const T*>(p.lse);
  const auto* dlse = static_cast<const T*>(p.dlse);
  const Buffer<T> delta(n.B * n.H * n.Nq);
  const BackwardTask<T> task{.scores = p.scores,
                             .value = p.value,
                             .dout = p.dout,
                             .dropout = p.dropout,
                             .dmap = {},
                             .head_weights = nullptr,
                             .lse = lse,
                             .delta = delta,
                             .mbar = static_cast<const T*>(p.mbar),
                             .dquery = p.dquery,
                             .dkey = p.dkey,
                             .dvalue = p.dvalue,
                             .dmask = p.dmask,
                             .dalpha = static_cast<T*>(p.dalpha),
                             .has_remainder = p.remainder.data != nullptr};
  if (task.wants_ds()) {
    compute_delta<E>(p, threads, delta.get());
  } else {
    fill<T>(delta, n.B * n.H * n.Nq, T(0));
  }
  backward_pass<E>(task, dlse, threads);
}

}  // namespace smattn::cpu::SMATTN_UNIT
