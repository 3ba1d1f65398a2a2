// One (batch, head) pair, query block and key block of backward: the five products of (6) and (7), and dM's and dalpha's share (8).
// P and dS are made strip by strip, so that the passes over them stay in the first-level cache; the sums that others add to come after.
#pragma once

#include "cpu/backward_tiles.h"
#include "cpu/tiles/dropout.h"

namespace smattn::cpu::SMATTN_UNIT {

// Where the step adds its results; null where not asked for.
template <class T>
struct Sums {
  T* dquery;  // [lane][D up to whole vectors], without scale
  T* dkey;  // [key][D up to whole vectors]
  T* dvalue;  // [key][Dv up to whole vectors]
  bool dkv_is_new;  // nothing there yet to add to
  void *final_dkey, *final_dvalue;  // nothing comes after: the sums go here, to the outputs; else null
  T* dmask;  // [key][lane]
  bool dmask_is_new;
  T* dalpha;  // [lane]
};

// Tiles of the block, [key][lane].
template <class T>
struct StepTiles {
  const T* mask;  // null where there is none
  const T* dmap;  // read of a map alone
  const T *weights, *factors;  // of a map that keeps weights, factors [lane]; else null
};

// What to fetch meanwhile, product by product.
struct StepPrefetch {
  Prefetch values, next_keys, next_queries, next_douts;
};

template <class E>
class BackwardStep {
 public:
  using T = SumOf<E>;

  BackwardStep(const BackwardTask<T>& task, const Blocking<T>& blocking)
      : t_(task), n_(task.scores.size), p_(kStripSize<T>), keep_(task.dropout.p > 0 ? kStripSize<T> : 0), dp_(kStripSize<T>),
        dalpha_(blocking.queries), tiles_(2 * tile_size(blocking)), weights_{tiles_}, ds_{tiles_ + tile_size(blocking)} {}

  int64_t bytes() const { return bytes_in(p_, keep_, dp_, dalpha_, tiles_); }

  // Room for a block's tile, keys rounded up to whole vectors; free but from scores() to add().
  T* scratch() const { return reinterpret_cast<T*>(tiles_.get()); }

  // P and dS of the block, and what nobody else adds to: dM, and dalpha for now in memory of its own.
  void scores(int64_t h, const QueryBlock& q, const KeyBlock& k, const QueryTiles<E>& tiles, const KeyTiles<E>& keys,
              const StepTiles<T>& given, const StepPrefetch& ahead, const Sums<T>& sums) {
    const int64_t most = strip_keys<T>(q.lanes);
    fill<T>(dalpha_, q.lanes, T(0));
    for (int64_t first = 0; first < k.count; first += most) {
      const KeyBlock strip = strip_of(k, first, most);
      const Strip s{.at = first * q.lanes,
                    .weights_at = first * WeightTile<E>::row(q.lanes),
                    .key = keys.key.from_row(first),
                    .value = keys.value.from_row(first),
                    .values_ahead = ahead.values.part(first, strip.count, k.count),
                    .keys_ahead = ahead.next_keys.part(first, strip.count, k.count)};
      if (t_.dropout.p > 0) dropout_tile<T>(t_.dropout, tiles.b * n_.H + h, q, strip, keep_);
      if (given.weights != nullptr) {
        kept_probabilities(q, strip, s, given);
      } else {
        probabilities(h, q, strip, s, tiles, given.mask);
      }
      if (t_.wants_ds()) score_gradients(h, q, strip, s, tiles, given, sums);
    }
    weights_.clear_rest(k.count, q.lanes);
    ds_.clear_rest(k.count, q.lanes);
  }

  // Adds dalpha, and the products of P and dS.
  void add(const QueryBlock& q, const KeyBlock& k, const QueryTiles<E>& tiles, const KeyTiles<E>& keys, const StepPrefetch& ahead,
           const Sums<T>& sums) {
    for (int64_t lane = 0; sums.dalpha != nullptr && lane < q.lanes; ++lane) sums.dalpha[lane] += dalpha_[lane];
    if (sums.dvalue != nullptr) {
      add_rows(weights_.by_lane(q.lanes), q, k, tiles.dout_steps, n_.Dv, T(1), ahead.next_queries, sums.dkv_is_new, sums.dvalue,
               sums.final_dvalue);
    }
    const int64_t stride = round_up(n_.D, kLanes<T>);
    if (sums.dkey != nullptr) {
      const char* dquery = reinterpret_cast<const char*>(sums.dquery);
      const Prefetch sums_ahead =
          dquery == nullptr ? Prefetch{} : Prefetch{{dquery, dquery + q.count * stride * static_cast<int64_t>(sizeof(T)) - 1}, {}};
      const T scale = static_cast<T>(t_.scores.scale);
      add_rows(ds_.by_lane(q.lanes), q, k, tiles.query_steps, n_.D, scale, sums_ahead, sums.dkv_is_new, sums.dkey, sums.final_dkey);
    }
    if (sums.dquery != nullptr) {  // the weights are no longer needed, and dS itself is not once its keys are paired
      product(ds_.by_key(k.count, q.lanes, weights_.get(), ds_.get()), keys.key_steps, q.count, stride / kLanes<T>, packed<E>(k.count),
              ahead.next_douts, AddTo<T>{sums.dquery, stride, false});
    }
  }

 private:
  static int64_t tile_size(const Blocking<T>& blocking) {
    return round_up(blocking.keys, kLanes<T>) * WeightTile<E>::row(blocking.queries) / kStepsPerElement<E>;
  }

  // A few keys of the block: where they begin in its tiles, their rows, and what to fetch meanwhile.
  struct Strip {
    int64_t at, weights_at;
    RowMajor<E> key, value;
    Prefetch values_ahead, keys_ahead;
  };

  const T* keep() const { return t_.dropout.p > 0 ? keep_.get() : nullptr; }
  // P of a strip lies among the weights P*C/(1-p) where it is the same.
  T* probability(const Strip& s) {
    if constexpr (kStepsPerElement<E> == 1) {
      if (keep() == nullptr) return weights_.get() + s.at;
    }
    return p_;
  }

  // P (2), from what forward left of the rows, and P*C/(1-p).
  void probabilities(int64_t h, const QueryBlock& q, const KeyBlock& k, const Strip& s, const QueryTiles<E>& tiles, const T* mask) {
    T* p = probability(s);
    dot_products(s.key, tiles.query, q, k.count, n_.D, s.values_ahead, p);
    const Exponents<E> exponent(t_.scores, h, at_or_null(mask, s.at));
    const int64_t row = WeightTile<E>::row(q.lanes);
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      each_key(
          k,
          [&](auto count, int64_t j) {
            exponentials<count()>(p, j * q.lanes + lane, q.lanes, s.weights_at + j * row + lane, row, exponent, tiles.exponents, lane);
          },
          [&](int64_t j) {  // even where the row's factor is NaN
            store(p + j * q.lanes + lane, Vec<T>{});
            weights_.put(s.weights_at + j * row + lane, Vec<T>{});
          });
    }
  }

  // The same of a map, from its weights.
  void kept_probabilities(const QueryBlock& q, const KeyBlock& k, const Strip& s, const StepTiles<T>& given) {
    T* p = probability(s);
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      const KeptWeights<T> kept(given.weights + s.at + lane, q.lanes, given.factors + lane);
      for (int64_t j = 0; j < k.count; ++j) store(p + j * q.lanes + lane, k.padded[j] ? Vec<T>{} : kept.factor * kept(j));
    }
  }

  // Of N keys from number `at` of the strip on, `stride` apart; their weights from `to` on, `row` apart.
  template <int N>
  void exponentials(T* p, int64_t at, int64_t stride, int64_t to, int64_t row, const Exponents<E>& exponent, const RowExponents<T>& rows,
                    int64_t lane) {
    const Vec<T> rest = load(rows.rest + lane), factor = load(rows.factor + lane);
    Vec<T> x[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = exponent(load(p + at + i * stride), at + i * stride, rest);
    if constexpr (kStepsPerElement<E> == 1) {
      exp2_each<T, N>(x, load(rows.lowest + lane), load(rows.highest + lane));
    } else {
      exp2_of_weights<T, N>(x, load(rows.lowest + lane));
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(p + at + i * stride, x[i] *= factor);
    const T* kept = keep();
    if (kStepsPerElement<E> == 1 && kept == nullptr) return;  // then they are the weights
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) weights_.put(to + i * row, kept == nullptr ? x[i] : x[i] * load(kept + at + i * stride));
  }

  // dS, and what is summed of it element by element.
  void score_gradients(int64_t h, const QueryBlock& q, const KeyBlock& k, const Strip& s, const QueryTiles<E>& tiles,
                       const StepTiles<T>& given, const Sums<T>& sums) {
    if (t_.dmap.data == nullptr) {
      dot_products(s.value, tiles.dout, q, k.count, n_.Dv, s.keys_ahead, dp_.get());
    } else {
      const T weight = t_.head_weights[h];
      for (int64_t i = 0; i < k.count * q.lanes; i += kLanes<T>) store(dp_ + i, weight * load(given.dmap + s.at + i));
    }
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      ScoreGradients g{.p = probability(s) + lane,
                       .dp = dp_ + lane,
                       .keep = at_or_null(keep(), lane),
                       .mask = sums.dalpha == nullptr ? nullptr : at_or_null(given.mask, s.at + lane),
                       .ds = ds_,
                       .dmask = at_or_null(sums.dmask, s.at + lane),
                       .dmask_is_new = sums.dmask_is_new,
                       .at = s.weights_at + lane,
                       .row = WeightTile<E>::row(q.lanes),
                       .stride = q.lanes,
                       .alpha = alpha_of<T>(t_.scores, h),
                       .delta = load(tiles.delta + lane),
                       .mbar = load(tiles.mbar + lane)};
      each_key(k, [&](auto count, int64_t j) { g.template next<count()>(j); }, [&](int64_t j) { g.skip(j); });
      store(dalpha_ + lane, load(dalpha_ + lane) + sum_of(g.dalpha));
    }
  }

  // At one vector of queries, a few keys at a time; pointers to its lanes in the strip, `stride` from key to key; in ds, the
  // block's, they are at number `at`, `row` from key to key.
  struct ScoreGradients {
    const T *p, *dp, *keep, *mask;
    WeightTile<E> ds;
    T* dmask;
    bool dmask_is_new;
    int64_t at, row, stride;
    T alpha;
    Vec<T> delta, mbar, dalpha[kExpAtOnce] = {};  // so that one sum need not wait for the last

    template <int N>
    void next(int64_t j) {
      Vec<T> x[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const int64_t key = (j + i) * stride;
        x[i] = keep == nullptr ? load(dp + key) : load(dp + key) * load(keep + key);
        x[i] = load(p + key) * (x[i] - delta);
        ds.put(at + (j + i) * row, x[i]);
      }
      if (dmask != nullptr) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          T* to = dmask + (j + i) * stride;
          store(to, dmask_is_new ? alpha * x[i] : fused(broadcast(alpha), x[i], load(to)));
        }
      }
      if (mask == nullptr) return;
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) dalpha[i] = fused(x[i], load(mask + (j + i) * stride) - mbar, dalpha[i]);
    }
    void skip(int64_t j) {
      ds.put(at + j * row, Vec<T>{});
      if (dmask != nullptr && dmask_is_new) store(dmask + j * stride, Vec<T>{});
    }
  };

  // p + at, or null where p is null.
  static auto* at_or_null(auto* p, int64_t at) { return p == nullptr ? nullptr : p + at; }

  // some(how many, first key) for the keys, as many at a time as there are together; skip(key) for one that is padding.
  template <class Some, class Skip>
  static void each_key(const KeyBlock& k, const Some& some, const Skip& skip) {
    for (int64_t j = 0; j < k.count;) {
      if (k.padded[j]) {
        skip(j++);
        continue;
      }
      int64_t end = k.attended == k.count ? k.count : j + 1;
      while (end < k.count && !k.padded[end]) ++end;
      for (; j + kExpAtOnce <= end; j += kExpAtOnce) some(Count<kExpAtOnce>{}, j);
      for (; j < end; ++j) some(Count<1>{}, j);
    }
  }
  template <int N>
  struct Count {
    constexpr int operator()() const { return N; }
  };

  // sum[key][.] += sum over the queries of weight[key][query] * rows[query][.], times `factor`; to `final` where that is not null, a padded
  // key's as 0, whatever NaN its weights of 0 met.
  void add_rows(RowMajor<E> weights, const QueryBlock& q, const KeyBlock& k, Vectors<E> rows, int64_t size, T factor, const Prefetch& ahead,
                bool is_new, T* sum, void* final) {
    const int64_t stride = round_up(size, kLanes<T>);
    product(weights, rows, k.count, stride / kLanes<T>, packed<E>(q.count), ahead,
            [sum, stride, factor, is_new, padded = &k.padded[0], final, dtype = t_.scores.dtype]<int R, int N>(int64_t j, int64_t c,
                                                                                                               const Vec<T>(&added)[R][N]) {
#pragma GCC unroll 32
              for (int r = 0; r < R; ++r) {
                const int64_t at = (j + r) * stride + c * kLanes<T>;
                Vec<T> x[N];
                for (int i = 0; i < N; ++i) {
                  x[i] = is_new ? added[r][i] * factor : fused(added[r][i], broadcast(factor), load(sum + at + i * kLanes<T>));
                }
                if (final != nullptr) {
                  for (int i = 0; padded[j + r] && i < N; ++i) x[i] = Vec<T>{};
                  stream_row<E>(dtype, final, at, stride, x);
                  continue;
                }
                for (int i = 0; i < N; ++i) store(sum + at + i * kLanes<T>, x[i]);
              }
            });
  }

  const BackwardTask<T>& t_;
  const Sizes& n_;
  Buffer<T> p_, keep_, dp_;  // [key][lane] of a strip
  Buffer<T> dalpha_;  // [lane]
  Buffer<E> tiles_;
  WeightTile<E> weights_, ds_;  // P*C/(1-p) and dS of the block
};

}  // namespace smattn::cpu::SMATTN_UNIT
