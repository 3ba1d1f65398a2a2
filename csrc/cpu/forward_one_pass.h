// Scores to weights in one pass, for matrix tiles: the exponents are taken relative to the maximum of the keys before, or of the first few.
// A weight may then be above 1, which costs no precision, as long as no sum leaves the range of floats: then the block is done again in two
// passes.
#pragma once

#include "cpu/forward_part.h"

namespace smattn::cpu::SMATTN_UNIT {

template <class E>
class OnePass {
 public:
  using T = SumOf<E>;
  static constexpr bool kServes = kStepUnit<E> > 1;  // it makes what products in tiles read

  explicit OnePass(const ForwardTask<T>& task)
      : D_(task.params.scores.size.D), wants_mbar_(task.wants_mbar()), scores_(kServes ? 2 * strip_size() : 0),
        weights_(kServes ? packed<E>(kKeys) * kQueries : 0) {}

  int64_t bytes() const { return bytes_in(scores_, weights_); }

  // Then products are too short for all that is to be fetched meanwhile, and would wait for it: it is fetched while the weights are made.
  static bool has_few_queries(const QueryBlock& q) { return q.lanes == kLanes<T>; }

  // Makes the block's weights and adds to the part's rows. False, and then nothing has changed, where it takes two passes: there are keys
  // that are padding or do not fill a strip, a query has no finite maximum, or the weights have grown too large.
  bool run(const Exponents<E>& exponent, const QueryBlock& q, const KeyBlock& k, RowMajor<E> key, const E* query,
           const Prefetch& values_ahead, const Prefetch& keys_ahead, const ForwardPart<E>& part) {
    if (k.attended < k.count || k.count % kStrip != 0) return false;
    T maxima[kQueries], sums[kSums][kQueries] = {};
    copy<T>(part.row(kMaximum), q.lanes, maxima);
    const bool first_keys = !all_finite(maxima, q.lanes);
    const bool few = has_few_queries(q);
    Fetching fetching(few ? values_ahead : Prefetch{}, few ? keys_ahead : Prefetch{}, k.count / kExpAtOnce);
    for (int64_t lane = 0; lane < q.lanes; lane += kGroup) {
      const int64_t lanes = smaller_of(kGroup, q.lanes - lane);
      const auto products = [&](int64_t first) {
        if (first >= k.count) return;
        product(key.from_row(first), Vectors<E>{query + lane, q.lanes}, kStrip, lanes / kLanes<T>, packed<E>(D_),
                !few && lane == 0 ? values_ahead.part(first, kStrip, k.count) : Prefetch{}, AddTo<T>{scores(first), kGroup, true});
      };
      products(0);
      for (int64_t first = 0; first < k.count; first += kStrip) {
        products(first + kStrip);  // before this strip's weights: tiles work beside vectors
        for (int64_t l = 0; l < lanes; l += kLanes<T>) {
          T* maximum = maxima + lane + l;
          if (first_keys && first == 0) {
            store(maximum, with_first(exponent, scores(0) + l, q, lane + l, load(maximum)));
            if (!all_finite(maximum, kLanes<T>)) return false;
          }
          weigh(exponent, scores(first) + l, q, first, lane + l, k.count, load(maximum), fetching, sums);
        }
      }
    }
    for (int64_t i = 0; i < q.lanes; ++i) {
      if (!(sums[0][i] <= kLargest)) return false;
    }
    copy<T>(maxima, q.lanes, part.row(kMaximum));
    constexpr Row kRow[kSums] = {kSum, kRounded, kMbar};
    for (int s = 0; s < kSums; ++s) {
      for (int64_t i = 0; i < q.lanes; ++i) part.row(kRow[s])[i] += sums[s][i];
    }
    return true;
  }

  RowMajor<E> weights(const KeyBlock& k) const { return {weights_, packed<E>(k.count)}; }  // [lane][pair of keys]

 private:
  static constexpr int64_t kStrip = kStripUnit, kGroup = 64;  // keys and lanes together: their scores stay in the first-level cache
  static constexpr T kLargest = 0x1p20;  // of a block's sum: far below where products with V could overflow that do not otherwise
  static constexpr int kSums = 3;  // of the weights, of them as rounded, of their products with M
  static constexpr int64_t strip_size() { return kStrip * kGroup; }

  struct Fetching {
    Prefetch values, keys;
    int64_t values_at_once, keys_at_once;

    Fetching(const Prefetch& values, const Prefetch& keys, int64_t times)
        : values(values), keys(keys), values_at_once(values.times_at_each(times)), keys_at_once(keys.times_at_each(times)) {}
    void next() { values.fetch(values_at_once), keys.fetch(keys_at_once); }
  };

  T* scores(int64_t first) const { return scores_ + first / kStrip % 2 * strip_size(); }

  // The maximum, of queries that have none that of the first strip.
  Vec<T> with_first(const Exponents<E>& exponent, const T* score, const QueryBlock& q, int64_t lane, Vec<T> maximum) const {
    Vec<T> found = broadcast(static_cast<T>(-__builtin_inf()));
    for (int64_t j = 0; j < kStrip; ++j) found = larger(found, exponent(load(score + j * kGroup), j * q.lanes + lane));
    return maximum == static_cast<T>(-__builtin_inf()) ? found : maximum;
  }

  // A strip's weights of one vector of queries, turned.
  void weigh(const Exponents<E>& exponent, const T* score, const QueryBlock& q, int64_t first, int64_t lane, int64_t keys,
             Vec<T> subtracted, Fetching& fetching, T (&sums)[kSums][kQueries]) {
    const T* mask = wants_mbar_ ? exponent.mask + first * q.lanes + lane : nullptr;
    Vec<T> sum = load(sums[0] + lane), rounded = load(sums[1] + lane), mbar = load(sums[2] + lane);
    Vec<E> pairs[kStrip / 2];
    for (int64_t j = 0; j < kStrip; j += kExpAtOnce) {
      fetching.next();
      Vec<T> p[kExpAtOnce];
#pragma GCC unroll 8
      for (int i = 0; i < kExpAtOnce; ++i) p[i] = exponent(load(score + (j + i) * kGroup), (first + j + i) * q.lanes + lane, subtracted);
      exp2_of_weights<T, kExpAtOnce>(p);
      sum += sum_of(p);
#pragma GCC unroll 8
      for (int i = 0; mask != nullptr && i < kExpAtOnce; ++i) mbar = fused(p[i], load(mask + (j + i) * q.lanes), mbar);
#pragma GCC unroll 8
      for (int i = 0; i < kExpAtOnce; i += 2) {
        const Vec<E> pair = paired(p[i], p[i + 1]);
        rounded += (Vec<T>)(pair << 16) + (Vec<T>)(pair & -0x10000);
        pairs[(j + i) / 2] = pair;
      }
    }
    transpose<E>(pairs);
    E* to = weights_ + lane * packed<E>(keys) + packed<E>(first);
    for (int i = 0; i < kLanes<E>; ++i) store(to + i * packed<E>(keys), pairs[i]);
    store(sums[0] + lane, sum), store(sums[1] + lane, rounded), store(sums[2] + lane, mbar);
  }

  const int64_t D_;
  const bool wants_mbar_;
  Buffer<T> scores_;  // [key][kGroup] of two strips
  Buffer<E> weights_;
};

}  // namespace smattn::cpu::SMATTN_UNIT
