// Backward, (5)-(8): P is rebuilt from lse, tile by tile; see backward_plan.h for who sums what.
#pragma once

#include "cpu/backward_plan.h"
#include "cpu/backward_step.h"
#include "cpu/forward.h"

namespace smattn::cpu::SMATTN_LEVEL {

// What items leave for each other: their sums, added up in the order of the splits when all are done.
template <class T>
struct BackwardParts {
  Buffer<T> sums;    // [split][group of a round][pair][query block][dQ] or [split][group of a round][batch, kv head][key block][dK, dV]
  Buffer<T> dmask;   // [dmask_parts][group of a round][row][Nk], of an M without the queries' extent
  Buffer<T> dmask_total;  // where groups take turns: [B|1, H|1, Nk] of such an M, else [H|1, query block, key block][key][lane]
  Buffer<T> dalpha;  // [split][B, H]
  int64_t sums_size, dmask_size, dalpha_size;  // of one split

  BackwardParts(const BackwardTask<T>& t, const BackwardPlan<T>& plan)
      : sums(plan.splits * plan.part_size()),
        dmask(plan.dmask_parts() * plan.round * plan.dmask_rows * plan.n.Nk),
        dmask_total(plan.dmask_total_size(t.scores.mask_size)),
        dalpha(plan.splits * plan.n.B * plan.n.H),
        sums_size(plan.part_size()),
        dmask_size(plan.round * plan.dmask_rows * plan.n.Nk),
        dalpha_size(plan.n.B * plan.n.H) {}
};

// dQ of one pair and query block, [lane][D], to its rows.
template <class T>
inline void store_dquery(const BackwardTask<T>& t, int64_t b, int64_t h, const QueryBlock& q, T* dquery) {
  const Sizes& n = t.scores.size;
  const int64_t stride = round_up(n.D, kLanes<T>);
  const T scale = static_cast<T>(t.scores.scale);
  for (int64_t i = 0; i < q.count * stride; ++i) dquery[i] *= scale;
  write_rows<T>(dquery, stride, q.count, n.D, t.dquery, t.scores.dtype, ((b * n.H + h) * n.Nq + q.first) * n.D, n.D);
}

// dK and dV of one (batch, kv head) and key block, to their rows; a padded key's are 0, whatever NaN met it.
template <class T>
inline void store_dkv(const BackwardTask<T>& t, int64_t b, int64_t g, const KeyBlock& k, int64_t keys, T* dkv) {
  const Sizes& n = t.scores.size;
  const int64_t stride = round_up(n.D, kLanes<T>), value_stride = round_up(n.Dv, kLanes<T>);
  T *dkey = dkv, *dvalue = dkv + keys * stride;
  for (int64_t j = 0; j < k.count && k.attended < k.count; ++j) {
    if (!k.padded[j]) continue;
    fill<T>(dkey + j * stride, stride, T(0));
    fill<T>(dvalue + j * value_stride, value_stride, T(0));
  }
  const int64_t row = (b * n.Hkv + g) * n.Nk + k.first;
  if (t.dkey != nullptr) write_rows<T>(dkey, stride, k.count, n.D, t.dkey, t.scores.dtype, row * n.D, n.D);
  if (t.dvalue != nullptr) write_rows<T>(dvalue, value_stride, k.count, n.Dv, t.dvalue, t.scores.dtype, row * n.Dv, n.Dv);
}

template <class E>
class Backward {
 public:
  using T = typename SumOf<E>::type;

  Backward(const BackwardTask<T>& task, const BackwardPlan<T>& plan, BackwardParts<T>& parts)
      : t_(task), n_(plan.n), plan_(plan), parts_(parts), pairs_(plan.pairs), tiles_(tile_slots()),
        tile_memory_(tile_slots() * QueryTiles<E>::size(n_, plan.blocking.queries)), step_(task),
        sums_(plan.sum_slots() * (plan.outer_keys ? plan.dkv_size() : plan.dquery_size())),
        dmask_(plan.dmask_tiles() * kKeys * kQueries), dalpha_(plan.pairs * kQueries), mask_(kKeys * kQueries),
        dmap_(task.dmap.data != nullptr ? kKeys * kQueries : 0),
        rows_(kQueries * kKeys), keys_(kKeys * row_elements<E>(n_.D)), values_(kKeys * row_elements<E>(n_.Dv)),
        key_steps_memory_(kPack<E> > 1 ? packed<E>(kKeys) * round_up(n_.D, kLanes<E>) : 0) {
    const int64_t size = QueryTiles<E>::size(n_, plan.blocking.queries);
    for (int64_t i = 0; i < tile_slots(); ++i) tiles_[i].place(n_, plan.blocking.queries, tile_memory_ + i * size);
  }

  // slot: the group's place in its round.
  void run(int64_t group, int64_t slot, int64_t split) {
    plan_.list(group, pairs_);
    slot_ = slot;
    begins_dmask_ = !plan_.batches_take_turns() || plan_.first_batch(group) == 0;
    ends_dmask_ = !plan_.batches_take_turns() || plan_.first_batch(group) + plan_.batches == n_.B;
    fill<T>(dalpha_, plan_.pairs * kQueries, T(0));
    const int64_t outer = plan_.outer_blocks(), inner = plan_.inner_blocks();
    clear_own_part(split);
    for (int64_t o = outer * split / plan_.splits; o < outer * (split + 1) / plan_.splits; ++o) {
      if (plan_.pairs_innermost) {
        for (int64_t i = 0; i < inner; ++i) {
          for (int64_t pair = 0; pair < plan_.pairs; ++pair) visit(split, o, i, pair);
        }
      } else {
        for (int64_t pair = 0; pair < plan_.pairs; ++pair) {
          for (int64_t i = 0; i < inner; ++i) visit(split, o, i, pair);
        }
      }
    }
    for (int64_t pair = 0; pair < plan_.pairs; ++pair) {
      T sum = 0;
      for (int64_t i = 0; i < kQueries; ++i) sum += dalpha_[pair * kQueries + i];
      parts_.dalpha[split * parts_.dalpha_size + pairs_[pair].b * n_.H + pairs_[pair].h] = sum;
    }
    drain();
  }

  // The splits' sums for one (pair, query block) or (batch, kv head, key block) of the round that begins with group `first`, added up
  // and stored.
  void reduce(int64_t first, int64_t item) {
    const int64_t size = plan_.outer_keys ? plan_.dquery_size() : plan_.dkv_size();
    const int64_t blocks = plan_.outer_keys ? plan_.blocking.query_blocks : plan_.blocking.key_blocks;
    T* sum = parts_.sums + item * size;
    for (int64_t s = 1; s < plan_.splits; ++s) {
      const T* from = parts_.sums + s * parts_.sums_size + item * size;
      for (int64_t i = 0; i < size; ++i) sum[i] += from[i];
    }
    const int64_t owners = plan_.outer_keys ? plan_.pairs : plan_.kvs, owner = item / blocks % owners, group = first + item / (blocks * owners);
    if (plan_.outer_keys) {
      plan_.list(group, pairs_);
      store_dquery<T>(t_, pairs_[owner].b, pairs_[owner].h, query_block(plan_.blocking, item % blocks), sum);
    } else {
      const int64_t b = plan_.first_batch(group) + owner / plan_.kv_heads, g = plan_.first_kv_head(group) + owner % plan_.kv_heads;
      store_dkv<T>(t_, b, g, key_block(t_.scores, plan_.blocking, b, item % blocks), plan_.blocking.keys, sum);
    }
  }

 private:
  void visit(int64_t split, int64_t o, int64_t i, int64_t pair_index) {
    const Pair& pair = pairs_[pair_index];
    const int64_t kb = plan_.outer_keys ? o : i, qb = plan_.outer_keys ? i : o, g = kv_head(n_, pair.h);
    const QueryBlock q = query_block(plan_.blocking, qb);
    if (block_read_.differs(t_.scores.padding == nullptr ? 0 : pair.b, kb, 0, 0)) k_ = key_block(t_.scores, plan_.blocking, pair.b, kb);
    const KeyBlock& k = k_;
    const Sums<T> sums = begin(split, i, pair_index, kb, qb);
    if (k.attended > 0) {
      QueryTiles<E>& tiles = tiles_[tile_slots() == 1 ? 0 : pair_index];
      tiles.read(t_, pair.b, pair.h, q);
      const T* mask = read_inputs(pair, g, kb, qb, q, k);
      step_.run(pair.h, q, k, tiles, keys_read_, mask, t_.dmap.data != nullptr ? dmap_.get() : nullptr,
                ahead(pair_index, i, k), sums);
    } else {
      if (sums.dmask != nullptr && sums.dmask_is_new) fill<T>(sums.dmask, k.count * q.lanes, T(0));
      if (sums.dkv_is_new) fill<T>(kv_slot(pair.kv), plan_.dkv_size(), T(0));
    }
    if (sums.dmask != nullptr) finish_dmask(split, pair_index, q, k, sums.dmask);
    const bool last_inner = i == plan_.inner_blocks() - 1;
    if (plan_.outer_keys && last_inner && pair.last_of_kv && wants_dkv() && !stored_directly(pair, k)) {
      store_dkv<T>(t_, pair.b, g, k, plan_.blocking.keys, kv_slot(pair.kv));
    }
    if (!plan_.outer_keys && last_inner && t_.dquery != nullptr) store_dquery<T>(t_, pair.b, pair.h, q, sums.dquery);
  }

  // This visit's values and the next one's keys, where they are not those of the visit before, and the next one's queries.
  StepAhead ahead(int64_t pair_index, int64_t i, const KeyBlock& k) const {
    if (!plan_.outer_keys) return {};
    const int64_t inner = plan_.inner_blocks();
    const bool pairs_turn = inner == 1 || plan_.pairs_innermost, last_pair = pair_index == plan_.pairs - 1, last_inner = i == inner - 1;
    const bool same_pair_next = !pairs_turn && !last_inner;
    const Pair& pair = pairs_[pair_index];
    const Pair& next = same_pair_next ? pair : pairs_[last_pair ? 0 : pair_index + 1];
    const bool with_value = t_.value.data != nullptr;
    StepAhead ahead;
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

  // Whether dK and dV of this visit are complete with it and can be written where they belong, as they come.
  bool stored_directly(const Pair& pair, const KeyBlock& k) const {
    return plan_.outer_keys && plan_.inner_blocks() == 1 && pair.first_of_kv && pair.last_of_kv && k.attended == k.count &&
           t_.scores.dtype == kStored<E> && n_.D % kLanes<T> == 0 && n_.Dv % kLanes<T> == 0 && is_aligned(t_.dkey) && is_aligned(t_.dvalue);
  }
  static bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }
  // Where queries are few their tiles are kept for all pairs.
  int64_t tile_slots() const { return plan_.outer_keys && plan_.inner_blocks() == 1 ? plan_.pairs : 1; }
  bool wants_dkv() const { return t_.dkey != nullptr || t_.dvalue != nullptr; }
  T* kv_slot(int64_t kv) { return sums_ + (plan_.pairs_innermost ? kv : 0) * plan_.dkv_size(); }
  T* query_slot(int64_t pair) { return sums_ + (plan_.pairs_innermost ? pair : 0) * plan_.dquery_size(); }

  // Where this visit's sums go, those that begin with it cleared.
  Sums<T> begin(int64_t split, int64_t i, int64_t pair_index, int64_t kb, int64_t qb) {
    const Pair& pair = pairs_[pair_index];
    const int64_t g = kv_head(n_, pair.h);
    T *dquery, *dkv;
    if (plan_.outer_keys) {
      dquery = own_part(split) + (pair_index * plan_.blocking.query_blocks + qb) * plan_.dquery_size();
      dkv = kv_slot(pair.kv);
    } else {
      dquery = query_slot(pair_index);
      dkv = own_part(split) + (pair.kv * plan_.blocking.key_blocks + kb) * plan_.dkv_size();
      if (i == 0) fill<T>(dquery, plan_.dquery_size(), T(0));
    }
    const bool tile = plan_.tile_dmask, direct = stored_directly(pair, k_);
    const int64_t row = (pair.b * n_.Hkv + g) * n_.Nk + k_.first;
    const int64_t bytes = bytes_of(t_.scores.dtype);
    void* dkey = direct ? static_cast<char*>(t_.dkey) + row * n_.D * bytes : static_cast<void*>(dkv);
    T* dmask = t_.dmask == nullptr ? nullptr : dmask_ + (tile && !plan_.pairs_innermost ? i * kKeys * kQueries : 0);
    if (tile && pair.first_of_mask && !begins_dmask_) {
      const QueryBlock q = query_block(plan_.blocking, qb);
      copy<T>(parts_.dmask_total + plan_.dmask_tile(pair.h, q, k_), k_.count * q.lanes, dmask);
    }
    T* own_dvalue = dkv + plan_.blocking.keys * round_up(n_.D, kLanes<T>);
    void* dvalue = direct ? static_cast<char*>(t_.dvalue) + row * n_.Dv * bytes : static_cast<void*>(own_dvalue);
    return {.dquery = t_.dquery != nullptr ? dquery : nullptr,
            .dkey = t_.dkey != nullptr ? dkey : nullptr,
            .dvalue = t_.dvalue != nullptr ? dvalue : nullptr,
            .dkv_is_new = plan_.outer_keys && i == 0 && pair.first_of_kv,
            .dkv_is_final = direct,
            .dmask = dmask,
            .dmask_is_new = !tile || (pair.first_of_mask && begins_dmask_),
            .dalpha = t_.dalpha != nullptr ? dalpha_ + pair_index * kQueries : nullptr};
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
    const int64_t mask_b = t_.scores.mask_size[0] == 1 && t_.scores.padding == nullptr ? 0 : pair.b;  // each batch selects its own out
    if (mask_read_.differs(mask_b, t_.scores.mask_size[1] == 1 ? 0 : pair.h, kb, qb)) {
      read_tile<T>(t_.scores.mask, pair.b, pair.h, q, k, rows_, mask_);
    }
    return mask_;
  }

  void finish_dmask(int64_t split, int64_t pair_index, const QueryBlock& q, const KeyBlock& k, const T* tile) {
    const int64_t* size = t_.scores.mask_size;
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
    if (!ends_dmask_) return copy<T>(tile, k.count * q.lanes, parts_.dmask_total + plan_.dmask_tile(pair.h, q, k));
    const int64_t stride = round_up(k.count, kLanes<T>);
    transpose_block<T>(tile, q.lanes, stride, q.lanes, rows_, stride);
    const int64_t b = size[0] == 1 ? 0 : pair.b, h = size[1] == 1 ? 0 : pair.h;
    const int64_t offset = ((b * size[1] + h) * n_.Nq + q.first) * n_.Nk + k.first;
    write_rows<T>(rows_, stride, q.count, k.count, t_.dmask, t_.scores.mask.dtype, offset, n_.Nk);
  }

  void clear_own_part(int64_t split) {
    if (plan_.wants_parts) fill<T>(own_part(split), parts_.sums_size / plan_.round, T(0));
  }
  T* own_part(int64_t split) { return parts_.sums + split * parts_.sums_size + slot_ * (parts_.sums_size / plan_.round); }

  const BackwardTask<T>& t_;
  const Sizes& n_;
  const BackwardPlan<T>& plan_;
  BackwardParts<T>& parts_;
  Buffer<Pair> pairs_;
  Buffer<QueryTiles<E>> tiles_;
  Buffer<E> tile_memory_;
  BackwardStep<E> step_;
  Buffer<T> sums_;    // [slot][dK, dV] or [slot][dQ]
  Buffer<T> dmask_;   // [inner block or one][key][lane]
  Buffer<T> dalpha_;  // [pair][lane]
  Buffer<T> mask_, dmap_, rows_;
  Buffer<E> keys_, values_, key_steps_memory_;
  KeyTiles<E> keys_read_{};
  KeyBlock k_;
  int64_t slot_ = 0;
  bool begins_dmask_ = true, ends_dmask_ = true;  // among the groups that share M
  Held block_read_, kv_read_, mask_read_, dmap_read_;
};

// dM of an M without the queries' extent, from the groups of one round, `first` the first of them: a group there is one (batch, kv head).
// A row of M that groups of other rounds share is summed in `parts.dmask_total` until the last of them is done.
template <class T>
inline void store_key_dmask(const BackwardTask<T>& t, const BackwardPlan<T>& plan, const BackwardParts<T>& parts, int64_t first,
                            int64_t groups, ParallelFor threads) {
  const Sizes& n = plan.n;
  const int64_t* size = t.scores.mask_size;
  constexpr int64_t kChunk = 1024;
  const int64_t chunks = blocks_of(n.Nk, kChunk), per_kv = n.H / n.Hkv;
  parallel_for(threads, size[0] * size[1] * chunks, 1, [&](int64_t begin, int64_t end) {
    T sum[kChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t at = item % chunks * kChunk, count = smaller_of(kChunk, n.Nk - at), row = item / chunks;
      const int64_t b = row / size[1], h = row % size[1], g = kv_head(n, h);
      const int64_t first_b = size[0] == 1 ? 0 : b, last_b = size[0] == 1 ? n.B - 1 : b;
      const int64_t first_g = size[1] == 1 ? 0 : g, last_g = size[1] == 1 ? n.Hkv - 1 : g;
      const int64_t from_group = first_b * n.Hkv + first_g, last_group = last_b * n.Hkv + last_g;
      if (last_group < first || from_group >= first + groups) continue;
      T* total = parts.dmask_total + row * n.Nk + at;
      for (int64_t j = 0; j < count; ++j) sum[j] = from_group < first ? total[j] : T(0);
      for (int64_t split = 0; split < plan.dmask_parts(); ++split) {
        for (int64_t bi = first_b; bi <= last_b; ++bi) {
          for (int64_t gi = first_g; gi <= last_g; ++gi) {
            const int64_t slot = bi * n.Hkv + gi - first;
            if (slot < 0 || slot >= groups) continue;
            for (int64_t r = 0; r < plan.dmask_rows; ++r) {
              if (size[1] > 1 && r != h % per_kv) continue;
              const T* from = parts.dmask + split * parts.dmask_size + (slot * plan.dmask_rows + r) * n.Nk + at;
              for (int64_t j = 0; j < count; ++j) sum[j] += from[j];
            }
          }
        }
      }
      if (last_group < first + groups) {
        write_rows<T>(sum, 0, 1, count, t.dmask, t.scores.mask.dtype, row * n.Nk + at, 0);
      } else {
        for (int64_t j = 0; j < count; ++j) total[j] = sum[j];
      }
    }
  });
}

// dalpha, from the items' sums of dS * (M - mbar) and the rows' mbar * dL.
template <class T>
inline void store_dalpha(const BackwardTask<T>& t, const BackwardPlan<T>& plan, const BackwardParts<T>& parts, const T* dlse) {
  const Sizes& n = plan.n;
  for (int64_t h = 0; h < n.H; ++h) {
    T sum = 0;
    for (int64_t b = 0; b < n.B; ++b) {
      for (int64_t split = 0; split < plan.splits; ++split) sum += parts.dalpha[split * parts.dalpha_size + b * n.H + h];
      if (dlse == nullptr || !has_keys(t.scores, b)) continue;
      for (int64_t row = (b * n.H + h) * n.Nq; row < (b * n.H + h + 1) * n.Nq; ++row) sum += t.mbar[row] * dlse[row];
    }
    t.dalpha[h] = sum;
  }
}

// Every gradient of a call without a query or without a key.
template <class T>
inline void store_zeros(const BackwardTask<T>& t) {
  const Sizes& n = t.scores.size;
  const auto zero = [](void* p, int64_t bytes) {
    if (p != nullptr) fill<char>(static_cast<char*>(p), bytes, 0);
  };
  const int64_t* mask = t.scores.mask_size;
  zero(t.dquery, n.B * n.H * n.Nq * n.D * bytes_of(t.scores.dtype));
  zero(t.dkey, n.B * n.Hkv * n.Nk * n.D * bytes_of(t.scores.dtype));
  zero(t.dvalue, n.B * n.Hkv * n.Nk * n.Dv * bytes_of(t.scores.dtype));
  zero(t.dmask, mask[0] * mask[1] * mask[2] * n.Nk * bytes_of(t.scores.mask.dtype));
  zero(t.dalpha, n.H * static_cast<int64_t>(sizeof(T)));
}

// (6)-(8), once delta is there.
template <class E, class T>
inline void backward_pass(const BackwardTask<T>& task, const T* dlse, ParallelFor threads) {
  if (task.scores.size.B == 0 || task.scores.size.Nq == 0 || task.scores.size.Nk == 0) return store_zeros(task);
  const BackwardPlan<T> plan(task);
  BackwardParts<T> parts(task, plan);
  for (int64_t first = 0; first < plan.groups; first += plan.round) {
    const int64_t groups = smaller_of(plan.round, plan.groups - first);
    parallel_for(threads, groups * plan.splits, 1, [&](int64_t begin, int64_t end) {
      Backward<E> backward(task, plan, parts);
      for (int64_t item = begin; item < end; ++item) {
        backward.run(first + item / plan.splits, item / plan.splits, item % plan.splits);
      }
    });
    if (plan.dmask_rows > 0) store_key_dmask(task, plan, parts, first, groups, threads);
    if (!plan.wants_parts) continue;
    parallel_for(threads, plan.part_items() / plan.round * groups, 1, [&](int64_t begin, int64_t end) {
      Backward<E> backward(task, plan, parts);
      for (int64_t item = begin; item < end; ++item) backward.reduce(first, item);
    });
  }
  if (task.dalpha != nullptr) store_dalpha(task, plan, parts, dlse);
}

// (5), from the output, or as the mean of dP under P in a pass of its own.
template <class E, class T>
inline void compute_delta(const BackwardParams& p, ParallelFor threads, T* delta) {
  const Sizes& n = p.scores.size;
  if (p.out.data == nullptr) {
    ForwardTask<T> means{.params = {}, .dmap = {}, .dout = p.dout, .eta = delta};
    means.params.scores = p.scores, means.params.value = p.value, means.params.dropout = p.dropout;
    forward_pass<E>(means, threads);
  } else {
    parallel_for(threads, n.B * n.H, 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> dout(n.Dv), out(n.Dv);
      for (int64_t bh = begin; bh < end; ++bh) {
        for (int64_t i = 0; i < n.Nq; ++i) {
          read_rows<T>(rows_of(p.dout, bh / n.H, bh % n.H, i), 1, n.Dv, dout, n.Dv);
          read_rows<T>(rows_of(p.out, bh / n.H, bh % n.H, i), 1, n.Dv, out, n.Dv);
          T sum = 0;
          for (int64_t d = 0; d < n.Dv; ++d) sum += dout[d] * out[d];
          delta[bh * n.Nq + i] = sum;
        }
      }
    });
  }
  const auto* dlse = static_cast<const T*>(p.dlse);
  for (int64_t row = 0; dlse != nullptr && row < n.B * n.H * n.Nq; ++row) delta[row] -= dlse[row];
}

template <class E>
inline void backward_of(const BackwardParams& p, ParallelFor threads) {
  using T = typename SumOf<E>::type;
  const Sizes& n = p.scores.size;
  const auto* lse = static_cast<const T*>(p.lse);
  const auto* dlse = static_cast<const T*>(p.dlse);
  const Buffer<T> delta(n.B * n.H * n.Nq);
  compute_delta<E>(p, threads, delta.get());
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
                             .unrounded_out = p.out.data != nullptr && p.out.dtype != p.scores.dtype};
  backward_pass<E>(task, dlse, threads);
}

}  // namespace smattn::cpu::SMATTN_LEVEL
