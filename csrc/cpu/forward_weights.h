// One tile of forward's scores and what becomes of it: exponents, then the weights that V is averaged by.
#pragma once

#include "cpu/forward_part.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class E>
class ForwardWeights {
 public:
  using T = SumOf<E>;

  explicit ForwardWeights(const ForwardTask<T>& task)
      : s_(task.params.scores), scores_(kKeys * kQueries), weights_(kStepsPerElement<E> > 1 ? packed<E>(kKeys) * kQueries : 0),
        turned_(kStepUnit<E> > 1 ? packed<E>(kKeys) * kQueries : 0) {}

  int64_t bytes() const { return bytes_in(scores_, weights_, turned_); }

  auto by_key(const QueryBlock& q, const KeyBlock& k) { return weights_by_key(weights(), packed<E>(k.count), q.lanes, turned_.get()); }

  // The exponents of one head's scores, a padded key's -inf; raises each query's maximum to theirs.
  void scores(int64_t h, const QueryBlock& q, const KeyBlock& k, RowMajor<E> key, const E* query, const T* mask, const Prefetch& ahead,
              T* maxima) {
    const bool* padded = k.attended < k.count ? k.padded : nullptr;
    product(key, Vectors<E>{query, q.lanes}, k.count, q.lanes / kLanes<T>, packed<E>(s_.size.D), ahead,
            [exponent = Exponents<E>(s_, h, mask), padded, maxima, scores = scores_.get(), stride = q.lanes]<int R, int N>(
                int64_t j, int64_t c, const Vec<T>(&products)[R][N]) {
              Vec<T> maximum[N];
              for (int v = 0; v < N; ++v) maximum[v] = load(maxima + (c + v) * kLanes<T>);
#pragma GCC unroll 32
              for (int r = 0; r < R; ++r) {
                const int64_t at = (j + r) * stride + c * kLanes<T>;
                const bool absent = padded != nullptr && padded[j + r];
#pragma GCC unroll 8
                for (int v = 0; v < N; ++v) {
                  Vec<T> x = exponent(products[r][v], at + v * kLanes<T>);
                  if (absent) x = broadcast(static_cast<T>(-__builtin_inf()));
                  store(scores + at + v * kLanes<T>, x);
                  maximum[v] = larger(maximum[v], x);
                }
              }
              for (int v = 0; v < N; ++v) store(maxima + (c + v) * kLanes<T>, maximum[v]);
            });
  }

  // Exponents to probabilities, not yet divided by their sum; `maxima` are those so far. Adds to the part's rows. `rescale` is what the
  // part's O is to be multiplied by. mask and dmap: tiles, null where they are not averaged.
  void softmax(const QueryBlock& q, const KeyBlock& k, const T* mask, const T* dmap, const T* maxima, const ForwardPart<E>& part,
               T* rescale) {
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) softmax_of(q, k, lane, mask, dmap, load(maxima + lane), part, rescale);
  }

  // The weights times C/(1-p), of pairs times C. keep: the tile of C/(1-p).
  void drop(const QueryBlock& q, const KeyBlock& k, const T* keep) {
    for (int64_t j = 0; j < k.count; j += kStepsPerElement<E>) {
      for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
        const T* kept = keep + j * q.lanes + lane;
        E* weight = weights() + j / kStepsPerElement<E> * q.lanes + lane;
        if constexpr (kStepsPerElement<E> == 1) {
          store(weight, load(weight) * load(kept));
        } else {
          store(weight, chosen(load(weight), load(kept) != T(0), load(kept + q.lanes) != T(0)));
        }
      }
    }
  }

 private:
  // Scores to weights for one vector of queries, `N` keys at a time; pointers to its lanes, `stride` from key to key (or pair).
  struct Weighing {
    const T *scores, *mask, *dmap;
    E* weights;
    int64_t stride, keys;
    Vec<T> subtracted, sum{}, rounded{}, mbar{}, eta{};

    template <int N, bool kWhole>  // else the last of them may lie beyond the keys
    void next(int64_t j) {
      Vec<T> p[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) p[i] = load(scores + (j + i) * stride) - subtracted;
      exp2_of_weights<T, N>(p);
      if (!kWhole && j + N > keys) p[N - 1] = Vec<T>{};
      const int used = kWhole || j + N <= keys ? N : N - 1;
      sum += sum_of(p);
      const auto add_products = [&](Vec<T>& to, const T* factors) {
#pragma GCC unroll 8
        for (int i = 0; i < used; ++i) to = fused(p[i], load(factors + (j + i) * stride), to);
      };
      if (mask != nullptr) add_products(mbar, mask);
      if (dmap != nullptr) add_products(eta, dmap);
#pragma GCC unroll 8
      for (int i = 0; i < N; i += kStepsPerElement<E>) {
        if constexpr (kStepsPerElement<E> == 1) {
          store(weights + (j + i) * stride, p[i]);
        } else {
          const Vec<E> pair = paired(p[i], p[i + 1]);
          constexpr E kOnes = 0x3f803f80;
          store(weights + (j + i) / 2 * stride, pair);
          multiply_add(rounded, pair, broadcast(kOnes));
        }
      }
    }
  };

  E* weights() {
    if constexpr (kStepsPerElement<E> == 1) return scores_;
    return weights_;
  }

  [[gnu::noinline]] void softmax_of(const QueryBlock& q, const KeyBlock& k, int64_t lane, const T* mask, const T* dmap, Vec<T> m,
                                    const ForwardPart<E>& part, T* rescale) {
    const auto row_of = [&](Row row) { return part.row(row) + lane; };
    const Vec<T> before = load(row_of(kMaximum)), subtracted = finite_maximum<T>(m);
    Weighing w{.scores = scores_ + lane,
               .mask = mask == nullptr ? nullptr : mask + lane,
               .dmap = dmap == nullptr ? nullptr : dmap + lane,
               .weights = weights() + lane,
               .stride = q.lanes,
               .keys = k.count,
               .subtracted = subtracted};
    int64_t j = 0;
    for (; j + kExpAtOnce <= k.count; j += kExpAtOnce) w.template next<kExpAtOnce, true>(j);
    for (; j < k.count; j += kStepsPerElement<E>) w.template next<kStepsPerElement<E>, false>(j);
    const Vec<T> factor = exp2<T>(before - subtracted);
    store(rescale + lane, factor);
    store(row_of(kMaximum), m);
    const auto add = [&](Row row, Vec<T> x) { store(row_of(row), rescaled<T>(factor, load(row_of(row))) + x); };
    add(kSum, w.sum);
    add(kRounded, w.rounded);
    add(kMbar, w.mbar);
    add(kEta, w.eta);
  }

  const Scores& s_;
  Buffer<T> scores_;   // [key][lane], then the probabilities, unless of pairs
  Buffer<E> weights_;  // the probabilities as pairs of keys
  Buffer<E> turned_;   // the same, [lane][pair of keys]
};

}  // namespace smattn::cpu::SMATTN_UNIT
