// How backward is cut into items that run in parallel, so that dK, dV and dM are each summed by one thread in one order.
//
// A group is the set of (batch, head) pairs that must stay together: the query heads of a kv head (dK and dV are summed over them),
// and all pairs that share M where dM has the queries' extent. Of many batches so many are in a group as memory holds, and of the heads of
// one batch so many where it does not hold all: then a group begins with the dM that the last one left. Where that makes few groups, the
// batches that share M are cut into shares, which have a dM each and go side by side; the shares' dM are added up in order. Batch elements
// are taken in the order of MaskBatch, in which those that share M are neighbours; a `place` is one's number in that order. An item is a
// group and a part of its outer blocks:
//   Nk >= Nq: outer blocks are key blocks. dK and dV are summed in scratch and stored once; every item has its own dQ to add to, unless
//             there is one key block.
//   Nk <  Nq: outer blocks are query blocks. dQ is summed in scratch and stored once; every item has its own dK and dV to add to.
// The items' own sums are added in order afterwards. How many items there are depends on the call's shape, its dtype and the gradients
// wanted, never on the threads. Where memory does not hold the sums of all groups, groups take turns, and where that choice of outer blocks
// asks too much and the other less, it is the other.
// Where that makes too few items, groups are cut into runs instead (runs.h): a row is an outer block, and a run one inner block of it with
// all pairs, pair by pair. The runs of a row add to the same dK and dV, and those of a group to its dQ, each after the one before it.
// Of an attention map whose batch elements do not share dM, a group has heads of one of them. Where memory holds the weights of a group,
// those of a round's groups are made ahead of their items: the mean of dA under them has to be there before dS.
#pragma once

#include "cpu/map_weights.h"
#include "cpu/workers.h"

namespace smattn::cpu::SMATTN_UNIT {

// What backward works on. Of the attention map, (10) instead of (5) and (6): dP is w_h * dA, `delta` is eta, and there is no value.
template <class T>
struct BackwardTask {
  Scores scores;
  Tensor4 value, dout;  // value.data null for the attention map
  Dropout dropout;
  Tensor4 dmap;  // [B, 1, Nq, Nk]
  const T* head_weights;
  const T* lse;  // [B, H, Nq]
  const T* normalizer;  // [B, H, Nq, 2], null where there is none
  const T* delta;  // [B, H, Nq], (5)
  const T* mbar;  // [B, H, Nq]
  const T* dlse;  // [B, H, Nq], null where lse was not used
  void *dquery, *dkey, *dvalue, *dmask;
  T* dalpha;  // [H]
  bool has_remainder;  // what rounding took from out is held in memory too

  bool wants_ds() const { return dquery != nullptr || dkey != nullptr || dmask != nullptr || dalpha != nullptr; }
};

struct Pair {
  int64_t b, h;
  int64_t kv;  // which of the group's (batch, kv head) it belongs to
  bool first_of_kv, last_of_kv;
  bool first_of_mask, last_of_mask;  // among consecutive pairs that read the same M
  int64_t end_of_kv;  // how many of the group's pairs have been visited with the last of the same kv
};

// What a call may hold besides its inputs and results: a quarter of them (out and its gradient, and the gradients asked for, included),
// and a little whatever its size; less what is held in any case.
struct BackwardMemory {
  int64_t io, held;

  template <class T>
  explicit BackwardMemory(const BackwardTask<T>& t) {
    const Scores& s = t.scores;
    const Sizes& n = s.size;
    const int64_t query = n.B * n.H * n.Nq, key = n.B * n.Hkv * n.Nk;
    const int64_t elements = query * (n.D + 2 * n.Dv + (t.dquery != nullptr ? n.D : 0)) +
                             key * (n.D + n.Dv + (t.dkey != nullptr ? n.D : 0) + (t.dvalue != nullptr ? n.Dv : 0));
    const int64_t mask = s.mask.data == nullptr ? 0 : s.mask_size[0] * s.mask_size[1] * s.mask_size[2] * n.Nk * bytes_of(s.mask.dtype);
    const bool key_sums = t.dmask != nullptr && s.mask_size[2] == 1 && (s.mask_size[0] < n.B || s.mask_size[1] < n.Hkv);
    const int64_t kept = t.normalizer != nullptr ? 2 : t.has_remainder ? n.Dv / 2 : 0;
    held = (query * (4 + kept) +  // lse, mbar, delta and dlse
            (key_sums ? s.mask_size[0] * s.mask_size[1] * n.Nk : 0)) *
           static_cast<int64_t>(sizeof(T));
    io = elements * bytes_of(s.dtype) + (t.dmask != nullptr ? 2 : 1) * mask;
  }

  int64_t free() const { return io / kPromisedShare + kSpareBytes - held; }
  int64_t for_sums() const { return larger_of<int64_t>(free() / 2, free() - io / 20 - (5 << 20)); }
  int64_t for_workers(int64_t sums) const { return free() - sums; }
};

template <class T>
struct BackwardPlan {
  BackwardMemory memory;
  Blocking<T> blocking;
  Sizes n;
  bool outer_keys;
  bool wants_parts;  // the sums that items leave for each other
  bool tile_dmask;  // dM has the queries' extent: summed over a group's pairs in a tile
  int64_t sharers;  // of one M: how many batch elements read it
  bool batch_inside;
  int64_t shares, turns;  // of the sharers of one M: parts that go side by side, each adding to a dM of its own, and the groups of one part
  int64_t head_turns;  // of the turns: parts of the heads of one batch element
  int64_t batches, kv_heads;  // in a group
  int64_t groups, pairs, kvs;  // how many groups; pairs and (batch, kv head)s in each
  bool pairs_innermost;  // else the inner blocks are
  int64_t splits;  // of the outer blocks
  int64_t dmask_rows;  // a group's rows of dM where M lacks the queries' extent
  int64_t round;  // how many groups at a time
  bool in_runs;
  int64_t row_slots;  // then: rows that have memory at a time
  MapShape<T> weights;  // of the attention map, kept for a round at a time; without blocks where they are made anew for dS

  explicit BackwardPlan(const BackwardTask<T>& t)
      : memory(t), blocking(t.scores.size), n(t.scores.size), weights(n), mask_batch_(t.scores.mask_batch) {
    const Scores& s = t.scores;
    const bool full_mask = s.mask.data != nullptr && s.mask_size[2] != 1;
    tile_dmask = t.dmask != nullptr && full_mask;
    sharers = mask_batch_.sharers(n.B);
    batch_inside = tile_dmask && sharers > 1;
    kv_heads = full_mask && s.mask_size[1] == 1 ? n.Hkv : 1;
    // The heads of a map share dA: they stay together as long as there are groups enough.
    if (t.dmap.data != nullptr && s.mask.data == nullptr) kv_heads = largest_divisor(n.Hkv, n.B * n.Hkv / weights.kItems);
    const int64_t heads = kv_heads * (n.H / n.Hkv), group_weights = heads * blocking.query_blocks * weights.head_bytes();
    const bool keeps = t.dmap.data != nullptr && !batch_inside && group_weights <= weights.kMostBytes &&
                       MapWorker<T>::query_bytes(blocking, n, heads) <= kQueryBytes;
    const int64_t weight_bytes = keeps ? smaller_of(weights.kMostBytes, n.B * (n.H / heads) * group_weights) : 0;
    BackwardMemory left = memory;  // beside the weights
    left.held += weight_bytes;
    const int64_t bytes = left.for_sums();
    const auto part_bytes = [&](bool by_keys) {  // of all groups, one split
      const bool wanted = by_keys ? t.dquery != nullptr && blocking.key_blocks > 1 : t.dkey != nullptr || t.dvalue != nullptr;
      const int64_t size = by_keys ? n.B * n.H * blocking.query_blocks * dquery_size() : n.B * n.Hkv * blocking.key_blocks * dkv_size();
      return wanted ? size * static_cast<int64_t>(sizeof(T)) : 0;
    };
    outer_keys = n.Nk >= n.Nq;
    if (part_bytes(outer_keys) > bytes && part_bytes(!outer_keys) < part_bytes(outer_keys)) outer_keys = !outer_keys;
    wants_parts = part_bytes(outer_keys) > 0;
    mask_by_head_ = s.mask.data != nullptr && s.mask_size[1] > 1;
    const int64_t dmask_bytes = dmask_tiles_size() * static_cast<int64_t>(sizeof(T));
    const int64_t kv_bytes = larger_of<int64_t>(1, part_bytes(outer_keys) / (n.B * n.Hkv));  // of a kv head's sums
    const bool small_dmask = dmask_bytes <= bytes / 4;
    if (kv_heads * kv_bytes > bytes && (!tile_dmask || small_dmask)) kv_heads = largest_divisor(n.Hkv, bytes / 2 / kv_bytes);
    head_turns = tile_dmask && s.mask_size[1] == 1 ? n.Hkv / kv_heads : 1;
    // Where the masks' heads make few groups, and dM is small beside the other sums: a larger dM would take what a share is to save.
    const bool cut = batch_inside && mask_batch_.masks() * groups_of_a_batch() < kItems && small_dmask;
    shares = cut ? largest_divisor(sharers, smaller_of(kItems / groups_of_a_batch(), bytes / 4 / dmask_bytes)) : 1;
    // Every thread has its group's tiles and sums. Where many threads are to have a share, a group is small.
    batches = batch_inside ? largest_divisor(sharers / shares, bytes / (cut ? 16 : 2) / batch_bytes()) : 1;
    turns = sharers / shares / batches * head_turns;
    groups = n.B / batches * groups_of_a_batch() * head_turns;
    kvs = batches * kv_heads;
    pairs = kvs * (n.H / n.Hkv);
    // Either every pair's sums are kept while the inner blocks pass, or every inner block's dM tile while the pairs pass.
    const int64_t sums = outer_keys ? kvs * dkv_size() : pairs * dquery_size();
    const int64_t tiles = inner_blocks() * blocking.keys * blocking.queries;
    pairs_innermost = (batch_inside && mask_by_head_) || (inner_blocks() > 1 && sums <= tiles);
    dmask_rows = t.dmask == nullptr || tile_dmask ? 0 : mask_by_head_ ? pairs : 1;
    const int64_t group_bytes = part_bytes(outer_keys) / groups + dmask_rows * n.Nk * static_cast<int64_t>(sizeof(T));
    round = smaller_of(groups, larger_of<int64_t>(1, bytes / larger_of<int64_t>(1, group_bytes)));
    if (keeps) round = smaller_of(round, weight_bytes / group_weights);
    if (adds_up_dmask()) round = largest_divisor(groups_of_a_turn(), round);  // no two that add to one dM
    if (keeps) {
      weights.blocks = round * blocking.query_blocks;
      weights.heads = pairs;
      weights.splits = smaller_of(weights.most_splits(), blocks_of(weights.kItems, weights.blocks));
    }
    splits = splits_within(bytes);
    plan_runs(sums * static_cast<int64_t>(sizeof(T)), left.free() - part_size() * static_cast<int64_t>(sizeof(T)));
  }

  bool keeps_weights() const { return weights.blocks > 0; }
  // Where a pair's weights of a query block lie; slot: its group's place in the round.
  int64_t weights_place(int64_t slot, const Pair& pair, int64_t query_block) const {
    return (slot * blocking.query_blocks + query_block) * weights.heads + pair.h % weights.heads;
  }

  int64_t first_outer(int64_t split) const { return outer_blocks() * split / splits; }
  int64_t sums_size() const { return sum_slots() * (outer_keys ? dkv_size() : dquery_size()); }
  int64_t row_size() const { return sums_size() + pairs * blocking.queries; }  // with dalpha's

  // Whether dM is made of more than one group's, in BackwardParts::dmask_total.
  bool adds_up_dmask() const { return (batch_inside && batches < sharers) || head_turns > 1; }
  int64_t dmask_tile(int64_t h, const QueryBlock& q, const KeyBlock& k) const {  // its place in what one group leaves for the next
    const int64_t head = mask_by_head_ ? h : 0, qb = q.first / blocking.queries, kb = k.first / blocking.keys;
    return ((head * blocking.query_blocks + qb) * blocking.key_blocks + kb) * blocking.keys * blocking.queries;
  }
  int64_t mask_heads() const { return mask_by_head_ ? n.H : 1; }
  int64_t dmask_tiles_size() const {  // of one M
    return mask_heads() * blocking.query_blocks * blocking.key_blocks * blocking.keys * blocking.queries;
  }
  int64_t dmask_total_size() const {
    if (adds_up_dmask()) return shares * dmask_tiles_size();
    return dmask_rows > 0 && round < groups ? mask_batch_.masks() * mask_heads() * n.Nk : 0;
  }
  int64_t outer_blocks() const { return outer_keys ? blocking.key_blocks : blocking.query_blocks; }
  int64_t inner_blocks() const { return outer_keys ? blocking.query_blocks : blocking.key_blocks; }
  int64_t sum_slots() const { return pairs_innermost ? (outer_keys ? kvs : pairs) : 1; }
  int64_t dmask_parts() const { return outer_keys ? 1 : splits; }  // of an M without the queries' extent: who owns a key block owns its sum
  bool dquery_at_once() const { return outer_keys && blocking.key_blocks == 1; }  // a visit has all of its pair's keys: nothing to add up
  int64_t dmask_tiles() const { return pairs_innermost ? 1 : inner_blocks(); }

  int64_t dquery_size() const { return round_up(n.D, kLanes<T>) * blocking.queries; }  // [lane][D], one (pair, query block)
  int64_t dkv_size() const { return blocking.keys * (round_up(n.D, kLanes<T>) + round_up(n.Dv, kLanes<T>)); }  // dK, dV: [key][...]
  int64_t part_items() const {  // a round's (pair, query block)s or (batch, kv head, key block)s
    return round * (outer_keys ? pairs * blocking.query_blocks : kvs * blocking.key_blocks);
  }
  int64_t part_size() const {  // what a round's items add to: of one split
    return wants_parts ? part_items() * (outer_keys ? dquery_size() : dkv_size()) : 0;
  }

  // The groups of an M are ordered by turn, then by share, then by head.
  int64_t groups_of_a_turn() const { return shares * groups_of_a_batch(); }
  int64_t turn(int64_t group) const { return group / groups_of_a_turn() % turns; }
  int64_t share(int64_t group) const { return group / groups_of_a_batch() % shares; }
  int64_t mask_of(int64_t group) const { return group / (turns * groups_of_a_turn()); }
  int64_t first_place(int64_t group) const {
    return mask_of(group) * sharers + (share(group) * turns + turn(group)) / head_turns * batches;
  }
  int64_t batch_at(int64_t place) const { return mask_batch_.at_place(place, n.B); }
  int64_t first_kv_head(int64_t group) const { return (turn(group) % head_turns + group % groups_of_a_batch()) * kv_heads; }

  // The group's pairs, in the order in which they are visited: those of one kv head are consecutive, but where M is shared by the
  // batch and has heads, those of one head are.
  Pair pair(int64_t group, int64_t i) const {
    const int64_t per_kv = n.H / n.Hkv;
    const bool heads_outside = batch_inside && mask_by_head_;
    const int64_t b = heads_outside ? i % batches : i / (kv_heads * per_kv);
    const int64_t h = heads_outside ? i / batches : i % (kv_heads * per_kv);
    const int64_t inside = h % per_kv;
    return {.b = batch_at(first_place(group) + b),
            .h = first_kv_head(group) * per_kv + h,
            .kv = b * kv_heads + h / per_kv,
            .first_of_kv = inside == 0,
            .last_of_kv = inside == per_kv - 1,
            .first_of_mask = mask_by_head_ ? !heads_outside || b == 0 : i == 0,
            .last_of_mask = mask_by_head_ ? !heads_outside || b == batches - 1 : i == pairs - 1,
            .end_of_kv = heads_outside ? (per_kv - 1) * batches + b + 1 : (i / per_kv + 1) * per_kv};
  }

 private:
  static constexpr int64_t kItems = 32;  // wanted side by side
  static constexpr int64_t kQueryBytes = 1 << 20;  // of a worker that makes weights

  bool mask_by_head_;
  MaskBatch mask_batch_;

  int64_t batch_bytes() const {  // of a group's tiles and sums, of one batch element
    const int64_t query_row = 3 * round_up(n.D, kLanes<T>) + 2 * round_up(n.Dv, kLanes<T>) + RowExponents<T>::kRows + 2;
    const int64_t head_size = n.Nq * round_up(n.D, kLanes<T>) + blocking.queries * query_row;
    return kv_heads * (n.H / n.Hkv * head_size + dkv_size()) * static_cast<int64_t>(sizeof(T));
  }

  // row_bytes: of the sums that an outer block has. left: bytes of memory beside the weights and the parts.
  void plan_runs(int64_t row_bytes, int64_t left) {
    in_runs = round * splits < kItems && outer_blocks() > 1 && inner_blocks() > 1 && dmask_rows == 0 && row_bytes <= left / 4 * 3;
    if (!in_runs) return;
    pairs_innermost = true;
    splits = 1;
    // A few rows are enough for all workers: memory serves more of these.
    row_slots = smaller_of(larger_of<int64_t>(1, left / 5 / row_bytes), round * outer_blocks());
  }

  int64_t groups_of_a_batch() const { return n.Hkv / kv_heads / head_turns; }

  // Of n, up to `most`, and 1 at least.
  static int64_t largest_divisor(int64_t n, int64_t most) {
    int64_t divisor = larger_of<int64_t>(1, smaller_of(n, most));
    while (n % divisor != 0) --divisor;
    return divisor;
  }

  int64_t splits_within(int64_t bytes) const {
    const int64_t one = larger_of<int64_t>(1, part_size() * static_cast<int64_t>(sizeof(T)));
    const int64_t most = smaller_of(larger_of<int64_t>(1, bytes / one), larger_of<int64_t>(1, outer_blocks()));
    const int64_t wanted = smaller_of(most, blocks_of(kItems, larger_of<int64_t>(1, round)));
    int64_t power = 1;  // powers of two share the blocks out more evenly
    while (power * 2 <= wanted) power *= 2;
    return power;
  }
};

}  // namespace smattn::cpu::SMATTN_UNIT
