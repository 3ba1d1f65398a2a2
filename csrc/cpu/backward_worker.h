// One worker of backward: it visits the (batch, head) pairs, query blocks and key blocks of an item in order; see backward_plan.h for who
// sums what.
#pragma once

#include "cpu/backward_reduce.h"
#include "cpu/backward_step.h"
#include "cpu/runs.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class E>
class BackwardWorker {
 public:
  using T = SumOf<E>;

  BackwardWorker(const BackwardTask<T>& task, const BackwardPlan<T>& plan, BackwardParts<T>& parts)
      : t_(task), n_(plan.n), plan_(plan), parts_(parts), pairs_(plan.pairs), tile_slots_(tile_slots()), tiles_(tile_slots_),
        tile_memory_(tile_slots_ * QueryTiles<E>::size(task, plan.blocking.queries)), step_(task, plan.blocking),
        row_memory_(plan.in_runs ? 0 : plan.row_size()), dquery_(plan.dquery_at_once() ? plan.dquery_size() : 0),
        tile_size_(round_up(plan.blocking.keys, kLanes<T>) * plan.blocking.queries),
        dmask_(task.dmask != nullptr ? plan.dmask_tiles() * tile_size_ : 0), mask_(task.scores.mask.data != nullptr ? tile_size_ : 0),
        dmap_(task.dmap.data != nullptr ? tile_size_ : 0), rows_(step_.scratch()),
        keys_(copied_rows(task.scores.key, n_.D, kLanes<E>) * row_elements<E>(n_.D)),
        values_(copied_rows(task.value, n_.Dv, kStepsPerElement<E>) * row_elements<E>(n_.Dv)),
        key_steps_memory_(steps_size<E>(plan.blocking.keys, n_.D)), row_(row_memory_) {
    const int64_t size = QueryTiles<E>::size(task, plan.blocking.queries);
    for (int64_t i = 0; i < tile_slots_; ++i) tiles_[i].place(task, plan.blocking.queries, tile_memory_ + i * size);
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
        const int64_t i = plan_.pairs_innermost ? v / plan_.pairs : v % inner, pair = plan_.pairs_innermost ? v % plan_.pairs : v / inner;
        visit(split, o, i, pair, [] {});
      }
    }
    drain();
  }

  // One run, of the group's outer block o.
  void run(int64_t group, int64_t slot, int64_t o, const Run& run, Runs& runs) {
    begin_group(group, slot);
    row_ = parts_.rows + runs.slot(run) * plan_.row_size();
    for (int64_t pair = 0; pair < plan_.pairs; ++pair) {
      const int64_t dquery = pair + 1, dkv = pairs_[pair].end_of_kv;  // how many visits a sum needs to be done before
      visit(0, o, run.index, pair, [&] { plan_.outer_keys ? runs.wait(run, dkv, dquery) : runs.wait(run, dquery, dkv); });
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
    dmask_total_ = parts_.dmask_total + plan_.share(group) * plan_.dmask_tiles_size();
  }

  // wait() returns when no other worker uses the sums that this visit adds to.
  template <class Wait>
  void visit(int64_t split, int64_t o, int64_t i, int64_t pair_index, const Wait& wait) {
    const Pair& pair = pairs_[pair_index];
    const int64_t kb = plan_.outer_keys ? o : i, qb = plan_.outer_keys ? i : o, g = kv_head(n_, pair.h);
    const QueryBlock q = query_block(plan_.blocking, qb);
    if (block_read_.differs(t_.scores.padding == nullptr ? 0 : pair.b, kb, 0, 0)) k_ = key_block(t_.scores, plan_.blocking, pair.b, kb);
    const KeyBlock& k = k_;
    T* dkv = dkv_of(split, pair, kb);
    const Sums<T> sums = sums_of(split, i, pair_index, qb, dkv);
    QueryTiles<E>& tiles = tiles_[tile_slots_ == 1 ? 0 : pair_index];
    const StepPrefetch next = ahead(pair_index, i, k);
    const bool has_scores = k.attended > 0;
    if (has_scores) {
      tiles.read(t_, pair.b, pair.h, q);
      const T* mask = read_inputs(pair, g, kb, qb, q, k);
      step_.scores(pair.h, q, k, tiles, keys_read_, tiles_of(pair, qb, kb, q, k, mask), next, sums);
    } else if (sums.dmask != nullptr && sums.dmask_is_new) {
      fill<T>(sums.dmask, k.count * q.lanes, T(0));
    }
    wait();
    clear(o == plan_.first_outer(split), i == 0, pair, sums, dkv);
    if (has_scores) {
      step_.add(q, k, tiles, keys_read_, next, sums);
    } else if (sums.dkv_is_new) {
      fill<T>(dkv, plan_.dkv_size(), T(0));
    }
    if (sums.dmask != nullptr) finish_dmask(split, pair_index, q, k, sums.dmask);
    const bool last_inner = i == plan_.inner_blocks() - 1;
    if (plan_.outer_keys && last_inner && pair.last_of_kv && wants_dkv() && !stored_directly(pair, i)) {
      store_dkv<T>(t_, pair.b, g, k, plan_.blocking.keys, dkv);
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
    if (tile_slots_ == 1) {
      const QueryBlock q = query_block(plan_.blocking, (pairs_turn && !last_pair ? i : i + 1) % inner);
      ahead.next_queries = rows_ahead(t_.scores.query, next.b, next.h, q.first, q.count, n_.D);
      if (with_value) ahead.next_douts = rows_ahead(t_.dout, next.b, next.h, q.first, q.count, n_.Dv);
    }
    return ahead;
  }

  // Whether dK and dV are complete with this visit, of inner block i, and can be written where they belong, as they come.
  bool stored_directly(const Pair& pair, int64_t i) const {
    return plan_.outer_keys && i == plan_.inner_blocks() - 1 && pair.last_of_kv && k_.attended > 0 &&
           can_stream<E>(t_.scores.dtype, n_.D) && can_stream<E>(t_.scores.dtype, n_.Dv) && is_aligned(t_.dkey) && is_aligned(t_.dvalue);
  }
  static bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }
  // Where queries are few their tiles are kept for the next key block, as far as a core's cache holds those of all pairs.
  int64_t tile_slots() const {
    constexpr int64_t kTilesBytes = 1 << 20;
    const int64_t bytes = plan_.pairs * QueryTiles<E>::size(t_, plan_.blocking.queries) * static_cast<int64_t>(sizeof(E));
    return plan_.outer_keys && plan_.outer_blocks() > 1 && plan_.inner_blocks() == 1 && bytes <= kTilesBytes ? plan_.pairs : 1;
  }
  // How many rows of key or value a block may have to be copied; 0 where all are read as they lie.
  int64_t copied_rows(const Tensor4& rows, int64_t size, int64_t unit) const {
    const bool in_place = t_.scores.padding == nullptr && size % unit == 0 && keys_in_place<E>(rows, n_.Nk, size);
    return in_place ? 0 : round_up(plan_.blocking.keys, kRowUnit<E>);
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

  // Where this visit's sums go.
  Sums<T> sums_of(int64_t split, int64_t i, int64_t pair_index, int64_t qb, T* dkv) {
    const Pair& pair = pairs_[pair_index];
    const int64_t g = kv_head(n_, pair.h);
    T* dquery = dquery_of(split, pair_index, qb);
    T* dalpha = row_ + plan_.sums_size() + pair_index * plan_.blocking.queries;
    const bool tile = plan_.tile_dmask, direct = stored_directly(pair, i);
    const int64_t row = (pair.b * n_.Hkv + g) * n_.Nk + k_.first;
    const int64_t bytes = bytes_of(t_.scores.dtype);
    const auto place = [&](void* gradient, int64_t size) {
      return direct && gradient != nullptr ? static_cast<char*>(gradient) + row * size * bytes : nullptr;
    };
    T* dmask = t_.dmask == nullptr ? nullptr : dmask_ + (tile && !plan_.pairs_innermost ? i * tile_size_ : 0);
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

  // The sums that begin with this visit, of its outer block's first inner one or of its item's first outer one.
  void clear(bool first_outer, bool first_inner, const Pair& pair, const Sums<T>& sums, T* dkv) {
    if (first_inner && sums.dalpha != nullptr) fill<T>(sums.dalpha, plan_.blocking.queries, T(0));
    if ((plan_.outer_keys ? first_outer : first_inner) && sums.dquery != nullptr) fill<T>(sums.dquery, plan_.dquery_size(), T(0));
    if (wants_dkv() && !plan_.outer_keys && first_outer && pair.first_of_kv) fill<T>(dkv, plan_.dkv_size(), T(0));
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
    if (mask_read_.differs(mask_in_tile(t_.scores, pair.b, k), t_.scores.mask_size[1] == 1 ? 0 : pair.h, kb, qb)) {
      read_mask<T>(t_.scores, pair.b, pair.h, q, k, rows_, mask_);
    }
    return mask_;
  }

  StepTiles<T> tiles_of(const Pair& pair, int64_t qb, int64_t kb, const QueryBlock& q, const KeyBlock& k, const T* mask) const {
    if (!plan_.keeps_weights()) return {.mask = mask, .dmap = dmap_, .weights = nullptr, .factors = nullptr};
    const MapWeights<T>& of = parts_.weights;
    const int64_t place = plan_.weights_place(slot_, pair, qb);
    return {.mask = mask,
            .dmap = dmap_,
            .weights = of.weights_of(place) + k.first * q.lanes,
            .factors = of.factors_of(place, of.shape.split_of(kb))};
  }

  void finish_dmask(int64_t split, int64_t pair_index, const QueryBlock& q, const KeyBlock& k, const T* tile) {
    const Pair& pair = pairs_[pair_index];
    if (!plan_.tile_dmask) {
      const int64_t own = plan_.dmask_rows > 1 ? pair_index : 0;
      T* row = parts_.dmask + (plan_.outer_keys ? 0 : split) * parts_.dmask_size + (slot_ * plan_.dmask_rows + own) * n_.Nk + k.first;
      const int64_t first_block = plan_.outer_keys ? 0 : plan_.first_outer(split);
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
  const int64_t tile_slots_;
  Buffer<QueryTiles<E>> tiles_;
  Buffer<E> tile_memory_;
  BackwardStep<E> step_;
  Buffer<T> row_memory_;
  Buffer<T> dquery_;  // of a visit
  const int64_t tile_size_;  // [key][lane], keys rounded up to whole vectors for those that are turned
  Buffer<T> dmask_;  // [inner block or one] tile
  Buffer<T> mask_, dmap_;
  T* rows_;  // [query][keys up to whole vectors], for what is turned
  Buffer<E> keys_, values_, key_steps_memory_;
  KeyTiles<E> keys_read_{};
  KeyBlock k_;
  int64_t slot_ = 0;
  bool begins_dmask_ = true, ends_dmask_ = true;  // among the groups that add to one dM
  T* dmask_total_ = nullptr;  // that dM
  Held block_read_, kv_read_, mask_read_, dmap_read_;
  T* row_;  // of the outer block at hand: [slot][dK, dV] or [slot][dQ], then dalpha's [pair][lane]
};

}  // namespace smattn::cpu::SMATTN_UNIT
