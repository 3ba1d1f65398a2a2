// One tile of forward's scores and what becomes of it: exponents, then the weights that V is averaged by.
#pragma once

#include "cpu/forward_part.h"
#include "cpu/tiles/weights.h"

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

  // The block's exponents, as exponents_of.
  void scores(const Exponents<E>& exponent, const QueryBlock& q, const KeyBlock& k, RowMajor<E> key, const E* query, const Prefetch& ahead,
              T* maxima) {
    exponents_of(exponent, q, k, key, query, s_.size.D, ahead, maxima, scores_.get());
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
  E* weights() {
    if constexpr (kStepsPerElement<E> == 1) return scores_;
    return weights_;
  }

  void softmax_of(const QueryBlock& q, const KeyBlock& k, int64_t lane, const T* mask, const T* dmap, Vec<T> m, const ForwardPart<E>& part,
                  T* rescale) {
    const auto row_of = [&](Row row) { return part.row(row) + lane; };
    const Vec<T> before = load(row_of(kMaximum)), subtracted = finite_maximum<T>(m);
    Weighing<E> w{.scores = scores_ + lane,
                  .mask = mask == nullptr ? nullptr : mask + lane,
                  .dmap = dmap == nullptr ? nullptr : dmap + lane,
                  .weights = weights() + lane,
                  .stride = q.lanes,
                  .keys = k.count,
                  .subtracted = subtracted};
    w.run();
    const Vec<T> factor = exp2<T>(before - subtracted);
    store(rescale + lane, factor);
    store(row_of(kMaximum), m);
    const auto add = [&](Row row, Vec<T> x) { store(row_of(row), rescaled<T>(row, factor, load(row_of(row))) + x); };
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
