// One tile of forward's scores and what becomes of it: exponents, then the weights that V is averaged by.
#pragma once

#include "cpu/forward_part.h"
#include "cpu/tiles/dropout.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class E>
class ForwardWeights {
 public:
  using T = typename SumOf<E>::type;

  explicit ForwardWeights(const ForwardTask<T>& task)
      : s_(task.params.scores), scores_(kKeys * kQueries), weights_(kStepsPerElement<E> > 1 ? packed<E>(kKeys) * kQueries : 0),
        turned_(kStepUnit<E> > 1 ? packed<E>(kKeys) * kQueries : 0) {}

  int64_t bytes() const { return bytes_in(scores_, weights_, turned_); }

  auto by_key(const QueryBlock& q, const KeyBlock& k) {
    return cpu::SMATTN_UNIT::by_key(weights(), packed<E>(k.count), q.lanes, turned_.get());
  }

  // The exponents of one head's scores, strip by strip; raises each query's maximum to theirs.
  void scores(int64_t h, const QueryBlock& q, const KeyBlock& k, RowMajor<E> key, const E* query, const T* mask, const Prefetch& ahead,
              T* maxima) {
    const Exponents<E> exponent(s_, h, mask);
    const int64_t keys = strip_keys<T>(q.lanes);
    for (int64_t first = -keys; first < k.count;
         first += keys) {  // a strip's products before the last one's exponents: tiles work beside vectors
      const int64_t next = first + keys, count = smaller_of(keys, k.count - next);
      if (count > 0) {
        dot_products(key.from_row(next), query, q, count, s_.size.D, ahead.part(next, count, k.count), scores_ + next * q.lanes);
      }
      for (int64_t lane = 0; first >= 0 && lane < q.lanes; lane += kLanes<T>) {
        store(maxima + lane, exponents(exponent, q.lanes, k, first, smaller_of(next, k.count), lane, load(maxima + lane)));
      }
    }
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
        for (int i = 0; i < used; ++i) to += p[i] * load(factors + (j + i) * stride);
      };
      if (mask != nullptr) add_products(mbar, mask);
      if (dmap != nullptr) add_products(eta, dmap);
#pragma GCC unroll 8
      for (int i = 0; i < N; i += kStepsPerElement<E>) {
        if constexpr (kStepsPerElement<E> == 1) {
          store(weights + (j + i) * stride, p[i]);
        } else {
          const Vec<E> pair = paired(p[i], p[i + 1]);
          store(weights + (j + i) / 2 * stride, pair);
          const Vec<T> first = (Vec<T>)(pair << 16), second = (Vec<T>)(pair & -0x10000);
          rounded += first + second;
        }
      }
    }
  };

  E* weights() {
    if constexpr (kStepsPerElement<E> == 1) return scores_;
    return weights_;
  }

  // For keys [first, end) and one vector of queries; returns the maximum of `before` and theirs. A padded key's is -inf.
  Vec<T> exponents(const Exponents<E>& exponent, int64_t stride, const KeyBlock& k, int64_t first, int64_t end, int64_t lane,
                   Vec<T> before) {
    constexpr int kChains = 4;  // so that one maximum need not wait for the last
    Vec<T> chain[kChains] = {before, before, before, before};
    const auto next = [&](Vec<T>& maximum, int64_t j) {
      const int64_t at = j * stride + lane;
      const Vec<T> x = exponent(load(scores_ + at), at);
      store(scores_ + at, x);
      maximum = larger(maximum, x);
    };
    int64_t j = first;
    for (; k.attended == k.count && j + kChains <= end; j += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) next(chain[c], j + c);
    }
    for (; j < end; ++j) {
      if (k.padded[j]) {
        store(scores_ + j * stride + lane, broadcast(static_cast<T>(-__builtin_inf())));
      } else {
        next(chain[0], j);
      }
    }
    return larger(larger(chain[0], chain[1]), larger(chain[2], chain[3]));
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
