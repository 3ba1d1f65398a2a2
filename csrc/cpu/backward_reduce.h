// What backward's items leave for each other, and how the gradients are made of it and stored.
#pragma once

#include "cpu/backward_plan.h"
#include "cpu/tiles/mask.h"

namespace smattn::cpu::SMATTN_UNIT {

// What items leave for each other: their sums, added up in the order of the splits when all are done.
template <class T>
struct BackwardParts {
  Buffer<T> sums;    // [split][group of a round][pair][query block][dQ] or [split][group of a round][batch, kv head][key block][dK, dV]
  Buffer<T> dmask;   // [dmask_parts][group of a round][row][Nk], of an M without the queries' extent
  Buffer<T> dmask_total;  // where groups add up dM: [masks, H|1, Nk] of such an M, else [share][H|1, query block, key block][key][lane]
  Buffer<T> dalpha;  // [outer block][B, H]
  Buffer<T> rows;    // [slot][sums and dalpha's], of a plan in runs
  MapWeights<T> weights;  // of a round, where the plan keeps them
  int64_t sums_size, dmask_size;  // of one split
  int64_t dalpha_size;            // of one outer block

  explicit BackwardParts(const BackwardPlan<T>& plan)
      : sums(plan.splits * plan.part_size()), dmask(plan.dmask_parts() * plan.round * plan.dmask_rows * plan.n.Nk),
        dmask_total(plan.dmask_total_size()), dalpha(plan.outer_blocks() * plan.n.B * plan.n.H),
        rows(plan.in_runs ? plan.row_slots * plan.row_size() : 0), weights(plan.weights), sums_size(plan.part_size()),
        dmask_size(plan.round * plan.dmask_rows * plan.n.Nk), dalpha_size(plan.n.B * plan.n.H) {}

  int64_t bytes() const { return bytes_in(sums, dmask, dmask_total, dalpha, rows, weights); }
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

// dK and dV of one (batch, kv head) and key block, to their rows, where drain() is to follow; a padded key's are 0, whatever NaN met it.
template <class T>
inline void store_dkv(const BackwardTask<T>& t, int64_t b, int64_t g, const KeyBlock& k, int64_t keys, T* dkv) {
  const Sizes& n = t.scores.size;
  const int64_t row = (b * n.Hkv + g) * n.Nk + k.first;
  const auto stream_rows = [&](T* rows, int64_t size, void* to) {
    if (to == nullptr) return;
    const int64_t stride = round_up(size, kLanes<T>);
    clear_padded(k, stride, rows);
    for (int64_t j = 1; j < k.count && size < stride; ++j) {  // side by side, each over what lay beyond the last
      for (int64_t c = 0; c < stride; c += kLanes<T>) store(rows + j * size + c, load(rows + j * stride + c));
    }
    stream_numbers<T>(rows, k.count * size, to, t.scores.dtype, row * size);
  };
  stream_rows(dkv, n.D, t.dkey);
  stream_rows(dkv + keys * round_up(n.D, kLanes<T>), n.Dv, t.dvalue);
}

// The splits' sums for one (pair, query block) or (batch, kv head, key block) of the round that begins with group `first`, added up
// and stored.
template <class T>
inline void store_sum(const BackwardTask<T>& t, const BackwardPlan<T>& plan, const BackwardParts<T>& parts, int64_t first, int64_t item) {
  const int64_t size = plan.outer_keys ? plan.dquery_size() : plan.dkv_size();
  const int64_t blocks = plan.outer_keys ? plan.blocking.query_blocks : plan.blocking.key_blocks;
  T* sum = parts.sums + item * size;
  for (int64_t s = 1; s < plan.splits; ++s) {
    const T* from = parts.sums + s * parts.sums_size + item * size;
    for (int64_t i = 0; i < size; ++i) sum[i] += from[i];
  }
  const int64_t owners = plan.outer_keys ? plan.pairs : plan.kvs, owner = item / blocks % owners, group = first + item / (blocks * owners);
  if (plan.outer_keys) {
    const Pair pair = plan.pair(group, owner);
    store_dquery<T>(t, pair.b, pair.h, query_block(plan.blocking, item % blocks), sum);
  } else {
    const int64_t b = plan.batch_at(plan.first_place(group) + owner / plan.kv_heads), g = plan.first_kv_head(group) + owner % plan.kv_heads;
    store_dkv<T>(t, b, g, key_block(t.scores, plan.blocking, b, item % blocks), plan.blocking.keys, sum);
  }
}

// dM of an M without the queries' extent, from the groups of one round, `first` the first of them: a group there is one (place, kv head).
// A row of M that groups of other rounds share is summed in `parts.dmask_total` until the last of them is done.
template <class T>
inline void store_key_dmask(const BackwardTask<T>& t, const BackwardPlan<T>& plan, const BackwardParts<T>& parts, int64_t first,
                            int64_t groups, ParallelFor threads) {
  const Sizes& n = plan.n;
  const int64_t* size = t.scores.mask_size;
  constexpr int64_t kChunk = 1024;
  const int64_t chunks = blocks_of(n.Nk, kChunk);
  parallel_for(threads, size[0] * size[1] * chunks, 1, [&](int64_t begin, int64_t end) {
    T sum[kChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t at = item % chunks * kChunk, count = smaller_of(kChunk, n.Nk - at), row = item / chunks;
      const int64_t mask = row / size[1], h = row % size[1], g = kv_head(n, h), own = h % plan.dmask_rows;
      const int64_t first_place = mask * plan.sharers, last_place = first_place + plan.sharers - 1;
      const int64_t first_g = size[1] == 1 ? 0 : g, last_g = size[1] == 1 ? n.Hkv - 1 : g;
      const int64_t from_group = first_place * n.Hkv + first_g, last_group = last_place * n.Hkv + last_g;
      if (last_group < first || from_group >= first + groups) continue;
      T* total = parts.dmask_total + row * n.Nk + at;
      for (int64_t j = 0; j < count; ++j) sum[j] = from_group < first ? total[j] : T(0);
      for (int64_t split = 0; split < plan.dmask_parts(); ++split) {
        for (int64_t place = first_place; place <= last_place; ++place) {
          for (int64_t gi = first_g; gi <= last_g; ++gi) {
            const int64_t slot = place * n.Hkv + gi - first;
            if (slot < 0 || slot >= groups) continue;
            const T* from = parts.dmask + split * parts.dmask_size + (slot * plan.dmask_rows + own) * n.Nk + at;
            for (int64_t j = 0; j < count; ++j) sum[j] += from[j];
          }
        }
      }
      if (last_group < first + groups) {
        write_dmask<T>(t.scores, mask, h, 0, at, sum, 0, 1, count, t.dmask);
      } else {
        for (int64_t j = 0; j < count; ++j) total[j] = sum[j];
      }
    }
  });
}

// A tile of dM, [key][lane], to its rows. rows: scratch of a tile's size.
template <class T>
inline void store_dmask_tile(const BackwardTask<T>& t, int64_t mask, int64_t h, const QueryBlock& q, const KeyBlock& k, const T* tile,
                             T* rows) {
  const int64_t stride = round_up(k.count, kLanes<T>), head = t.scores.mask_size[1] == 1 ? 0 : h;
  transpose_block<T>(tile, q.lanes, stride, q.lanes, rows, stride);
  write_dmask<T>(t.scores, mask, head, q.first, k.first, rows, stride, q.count, k.count, t.dmask);
}

// dM of one M, whose groups are all done, from the sums of its shares in their order.
template <class T>
inline void store_shares(const BackwardTask<T>& t, const BackwardPlan<T>& plan, const BackwardParts<T>& parts, int64_t mask,
                         ParallelFor threads) {
  const int64_t blocks = plan.blocking.query_blocks * plan.blocking.key_blocks, share_size = plan.dmask_tiles_size();
  parallel_for(threads, t.scores.mask_size[1] * blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> tile(kKeys * kQueries), rows(kKeys * kQueries);
    for (int64_t item = begin; item < end; ++item) {
      const QueryBlock q = query_block(plan.blocking, item / plan.blocking.key_blocks % plan.blocking.query_blocks);
      const KeyBlock k = key_block(t.scores, plan.blocking, plan.batch_at(mask * plan.sharers), item % plan.blocking.key_blocks);
      const int64_t h = item / blocks, size = k.count * q.lanes;
      const T* from = parts.dmask_total + plan.dmask_tile(h, q, k);
      copy<T>(from, size, tile.get());
      for (int64_t share = 1; share < plan.shares; ++share) {
        for (int64_t i = 0; i < size; ++i) tile[i] += from[share * share_size + i];
      }
      store_dmask_tile<T>(t, mask, h, q, k, tile, rows);
    }
  });
}

// dalpha, from the outer blocks' sums of dS * (M - mbar) and the rows' mbar * dL.
template <class T>
inline void store_dalpha(const BackwardTask<T>& t, const BackwardPlan<T>& plan, const BackwardParts<T>& parts) {
  const Sizes& n = plan.n;
  const auto is_dead = dead_rows<T>(t.lse, t.normalizer);
  for (int64_t h = 0; h < n.H; ++h) {
    T sum = 0;
    for (int64_t b = 0; b < n.B; ++b) {
      for (int64_t o = 0; o < plan.outer_blocks(); ++o) sum += parts.dalpha[o * parts.dalpha_size + b * n.H + h];
      if (t.dlse == nullptr) continue;
      for (int64_t row = (b * n.H + h) * n.Nq; row < (b * n.H + h + 1) * n.Nq; ++row) {
        if (!is_dead(row)) sum += t.mbar[row] * t.dlse[row];
      }
    }
    t.dalpha[h] = sum;
  }
}

inline bool is_empty(const Sizes& n) { return n.B == 0 || n.Nq == 0 || n.Nk == 0; }

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

}  // namespace smattn::cpu::SMATTN_UNIT
