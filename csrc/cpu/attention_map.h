// The attention map (9) and its backward (10), on the tiles of forward and backward.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace smattn::cpu::SMATTN_LEVEL {

// Probabilities of one head from its logsumexp, tile by tile: done(key, first lane, P).
template <class T>
class MapTiles {
 public:
  explicit MapTiles(const Scores& s)
      : s_(s), n_(s.size), query_(kQueries * round_up(n_.D, kLanes<T>)), keys_(kKeys * round_up(n_.D, kLanes<T>)),
        rows_(kQueries * larger_of(kKeys, round_up(n_.D, kLanes<T>))), mask_(kKeys * kQueries) {}

  // Once for a head and query block.
  void begin(int64_t b, int64_t h, const QueryBlock& q, const T* lse) {
    scaled_query<T>(s_, b, h, q, rows_, query_);
    for (int64_t i = 0; i < q.lanes; ++i) {
      const T* row = lse + (b * n_.H + h) * n_.Nq + q.first;
      const bool dead = i >= q.count || row[i] == static_cast<T>(-__builtin_inf());
      lse_log2_[i] = static_cast<T>(dead ? __builtin_inf() : to_log2(row[i]));
    }
  }

  template <class Done>
  void probabilities(int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, const Done& done) {
    if (s_.mask.data != nullptr) read_tile<T>(s_.mask, b, h, q, k, rows_, mask_);
    const T* mask = s_.mask.data != nullptr ? mask_.get() : nullptr;
    const RowMajor<T> key = read_keys<T>(s_.key, b, kv_head(n_, h), k, n_.D, keys_);
    score_tile<T>(key, query_, n_.D, q, k, alpha_of<T>(s_, h) * static_cast<T>(kLog2e), mask, [&](int64_t j, int64_t lane, Vec<T> s) {
      const Vec<T> p = exp2<T>(s - load(lse_log2_ + lane));
      done(j, lane, k.padded[j] ? Vec<T>{} : p);
    });
  }

  const T* mask() const { return mask_; }
  T* rows() { return rows_; }

 private:
  const Scores& s_;
  const Sizes& n_;
  Buffer<T> query_, keys_, rows_, mask_;
  T lse_log2_[kQueries];
};

template <class T>
inline void attention_map_of(const MapParams& p, ParallelFor threads) {
  const Sizes& n = p.scores.size;
  ForwardParams softmax{};  // of a value without columns: lse alone
  softmax.scores = p.scores;
  softmax.scores.size.Dv = 0;
  softmax.lse = p.lse;
  forward_of<T>(softmax, threads);
  const Blocking<T> blocking(n);
  parallel_for(threads, n.B * blocking.query_blocks * blocking.key_blocks, 1, [&](int64_t begin, int64_t end) {
    MapTiles<T> tiles(p.scores);
    const Buffer<T> sum(kKeys * kQueries);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t kb = item % blocking.key_blocks, qb = item / blocking.key_blocks % blocking.query_blocks;
      const int64_t b = item / (blocking.key_blocks * blocking.query_blocks);
      const QueryBlock q = query_block(blocking, qb);
      const KeyBlock k = key_block(p.scores, blocking, b, kb);
      fill<T>(sum, kKeys * q.lanes, T(0));
      for (int64_t h = 0; h < n.H && k.attended > 0; ++h) {
        const T weight = static_cast<const T*>(p.head_weights)[h];
        tiles.begin(b, h, q, static_cast<const T*>(p.lse));
        tiles.probabilities(b, h, q, k, [&](int64_t j, int64_t lane, Vec<T> probability) {
          T* to = sum + j * q.lanes + lane;
          store(to, load(to) + weight * probability);
        });
      }
      const int64_t stride = round_up(k.count, kLanes<T>);
      transpose_block<T>(sum, q.lanes, stride, q.lanes, tiles.rows(), stride);
      write_rows<T>(tiles.rows(), stride, q.count, k.count, p.map, DTypeOf<T>::value, (b * n.Nq + q.first) * n.Nk + k.first, n.Nk);
    }
  });
}

// eta of (10) and mbar of (8), [B, H, Nq] each.
template <class T>
inline void map_rows(const MapBackwardParams& p, T* eta, T* mbar, ParallelFor threads) {
  const Sizes& n = p.scores.size;
  const Blocking<T> blocking(n);
  parallel_for(threads, n.B * n.H * blocking.query_blocks, 1, [&](int64_t begin, int64_t end) {
    MapTiles<T> tiles(p.scores);
    const Buffer<T> dmap(kKeys * kQueries);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t qb = item % blocking.query_blocks, h = item / blocking.query_blocks % n.H, b = item / (blocking.query_blocks * n.H);
      const QueryBlock q = query_block(blocking, qb);
      T eta_sum[kQueries] = {}, mbar_sum[kQueries] = {};
      tiles.begin(b, h, q, static_cast<const T*>(p.lse));
      for (int64_t kb = 0; kb < blocking.key_blocks; ++kb) {
        const KeyBlock k = key_block(p.scores, blocking, b, kb);
        if (k.attended == 0) continue;
        read_tile<T>(p.dmap, b, 0, q, k, tiles.rows(), dmap);
        tiles.probabilities(b, h, q, k, [&](int64_t j, int64_t lane, Vec<T> probability) {
          const int64_t at = j * q.lanes + lane;
          store(eta_sum + lane, load(eta_sum + lane) + probability * load(dmap + at));
          if (mbar != nullptr) store(mbar_sum + lane, load(mbar_sum + lane) + probability * load(tiles.mask() + at));
        });
      }
      const int64_t row = (b * n.H + h) * n.Nq + q.first;
      for (int64_t i = 0; i < q.count; ++i) {
        const bool dead = static_cast<const T*>(p.lse)[row + i] == static_cast<T>(-__builtin_inf());
        eta[row + i] = dead ? T(0) : eta_sum[i];
        if (mbar != nullptr) mbar[row + i] = mbar_sum[i];
      }
    }
  });
}

template <class T>
inline void attention_map_backward_of(const MapBackwardParams& p, ParallelFor threads) {
  const Sizes& n = p.scores.size;
  const int64_t rows = n.B * n.H * n.Nq;
  const auto* weights = static_cast<const T*>(p.head_weights);
  const Buffer<T> eta(rows), mbar(rows);
  map_rows<T>(p, eta, p.dalpha != nullptr && p.scores.mask.data != nullptr ? mbar.get() : nullptr, threads);
  if (p.dhead_weights != nullptr) {
    for (int64_t h = 0; h < n.H; ++h) {
      T sum = 0;
      for (int64_t b = 0; b < n.B; ++b) {
        for (int64_t i = 0; i < n.Nq; ++i) sum += eta[(b * n.H + h) * n.Nq + i];
      }
      static_cast<T*>(p.dhead_weights)[h] = sum;
    }
  }
  for (int64_t row = 0; row < rows; ++row) eta[row] *= weights[row / n.Nq % n.H];
  BackwardTask<T> task{};
  task.scores = p.scores;
  task.scores.size.Dv = 0;
  task.dmap = p.dmap;
  task.head_weights = weights;
  task.lse = static_cast<const T*>(p.lse);
  task.delta = eta;
  task.mbar = mbar;
  task.dquery = p.dquery, task.dkey = p.dkey, task.dmask = p.dmask;
  task.dalpha = static_cast<T*>(p.dalpha);
  if (task.wants_ds()) backward_pass(task, static_cast<const T*>(nullptr), threads);
}

}  // namespace smattn::cpu::SMATTN_LEVEL
