// What forward works on, and what one split of the keys leaves of one head and query block: parts to be merged, divided and stored.
#pragma once

#include "cpu/simd/exp2.h"
#include "cpu/tiles/tiles.h"

namespace smattn::cpu::SMATTN_UNIT {

// What forward works on. Besides O it can average under P what is not M: dA, for the attention map's backward, which needs eta (10), or dP,
// for a backward that needs delta (5) and has no O.
template <class T>
struct ForwardTask {
  ForwardParams params;
  Tensor4 dmap{};    // [B, 1, Nq, Nk], dA
  Tensor4 dout{};    // [B, H, Nq, Dv], what dP is made of; one of the two where there is eta
  T* eta = nullptr;  // [B, H, Nq]

  bool wants_mbar() const { return params.mbar != nullptr && params.scores.mask.data != nullptr; }
};

// The rows that go with O: the maximum score, the sum of the probabilities relative to it, their sum as rounded to pairs, and the sums of
// their products with M and with what eta is the mean of.
enum Row { kMaximum, kSum, kRounded, kMbar, kEta, kRows };

// What to subtract from scores: an infinite maximum less itself would be NaN. A row whose maximum is +inf has an infinite sum or NaN, and
// its out is NaN.
template <class T>
inline Vec<T> finite_maximum(Vec<T> m) {
  return m - m == T(0) ? m : Vec<T>{};
}

// Whether a row has no key to attend to, from its greatest score in base 2: one below -2.3e38 counts as -inf, in every dtype. A maximum
// does not see NaN, but the sum does.
template <class T>
inline bool is_dead(T maximum, T sum) {
  return static_cast<double>(maximum) < -2.3e38 * kLog2e && sum == sum;
}

template <class E>
struct ForwardPart {
  using T = SumOf<E>;

  T* rows;  // [row][lane]
  int64_t lanes;
  T* out;          // [query][stride], O before it is divided
  int64_t stride;  // Dv, up to whole vectors

  ForwardPart(T* memory, int64_t lanes, int64_t Dv)
      : rows(memory), lanes(lanes), out(memory + kRows * lanes), stride(round_up(Dv, kLanes<T>)) {}

  static int64_t size(const Sizes& n, int64_t lanes) {
    return kRows * lanes + out_rows(smaller_of(n.Nq, lanes)) * round_up(n.Dv, kLanes<T>);
  }

  T* row(Row which) const { return rows + which * lanes; }

  void clear(int64_t queries) const {
    fill<T>(rows, kRows * lanes + out_rows(queries) * stride, T(0));
    fill<T>(row(kMaximum), lanes, static_cast<T>(-__builtin_inf()));
  }

 private:
  static int64_t out_rows(int64_t queries) { return round_up(queries, kRowUnit<E>); }  // what products read and write
};

template <class T>
inline void add_weighted(const T* weight, int64_t rows, int64_t stride, const T* from, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vec<T> w = broadcast(weight[i]);
    for (int64_t at = i * stride; at < (i + 1) * stride; at += kLanes<T>) store(to + at, fused(w, load(from + at), load(to + at)));
  }
}

// factor * sum. Of means it is 0 where factor is 0, because a sum of M over keys whose weight has vanished may be infinite; a sum of weights
// that is NaN stays NaN, for so is the row.
template <class T>
inline Vec<T> rescaled(Row row, Vec<T> factor, Vec<T> sum) {
  const bool is_mean = row == kMbar || row == kEta;
  if (!is_mean) return factor * sum;
  return factor == T(0) ? Vec<T>{} : factor * sum;
}

// The parts of `splits` splits, `distance` apart, into one, in their order.
template <class E, class T>
inline void merge_parts(const ForwardParams& p, const QueryBlock& q, T* parts, int64_t splits, int64_t distance, const ForwardPart<E>& to) {
  const int64_t Dv = p.scores.size.Dv;
  for (int64_t s = 0; s < splits; ++s) {
    const T* maximum = ForwardPart<E>(parts + s * distance, q.lanes, Dv).row(kMaximum);
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      store(to.row(kMaximum) + lane, larger(load(to.row(kMaximum) + lane), load(maximum + lane)));
    }
  }
  T weight[kQueries];
  for (int64_t s = 0; s < splits; ++s) {
    const ForwardPart<E> from(parts + s * distance, q.lanes, Dv);
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      const Vec<T> w = exp2<T>(load(from.row(kMaximum) + lane) - finite_maximum<T>(load(to.row(kMaximum) + lane)));
      store(weight + lane, w);
      for (int row = kSum; row < kRows; ++row) {
        T* sum = to.row(static_cast<Row>(row)) + lane;
        store(sum, load(sum) + rescaled<T>(static_cast<Row>(row), w, load(from.row(static_cast<Row>(row)) + lane)));
      }
    }
    add_weighted(weight, q.count, to.stride, from.out, to.out);
  }
}

// The logsumexp of rows from their maximum scores, in base 2, and their sums relative to those.
template <class T>
inline void logsumexp(const T* maxima, const T* sums, int64_t lanes, T* lse) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes<double>) {
    const Vec<double> exponent = load_doubles(maxima + lane), log = natural_log(load_doubles(sums + lane));
    store_doubles(lse + lane, fused(exponent, broadcast(kLn2), fused(exponent, broadcast(kLn2Rest), log)));
  }
}

// Stores the maximum score of a row, in base 2, and 1/l, from which backward rebuilds P: of a dead row +inf and 0.
template <class T>
inline void store_normalizer(T* to, bool alive, T maximum, T sum) {
  to[0] = alive ? maximum : static_cast<T>(__builtin_inf());
  // NaN where the sum is infinite
  to[1] = alive ? 1 / sum + (sum - sum) : T(0);
}

// Divides by the row sums and stores what was asked for. O is divided by the sum of the weights as V was multiplied by them, rounded where
// they were: then O is a mean of V to the last bit of float32, and delta (5), which is made of it, cancels a dP that is the same for all
// keys. A dead row, which has no key or none whose score counts, has 0 for out and -inf for lse.
template <class E>
inline void write_part(const ForwardTask<SumOf<E>>& task, int64_t b, int64_t h, const QueryBlock& q, const ForwardPart<E>& part) {
  using T = SumOf<E>;
  const ForwardParams& p = task.params;
  const Sizes& n = p.scores.size;
  const int64_t row = (b * n.H + h) * n.Nq + q.first;
  // The weights of pairs do not have dropout's factor yet.
  const T kept = kStepsPerElement<E> > 1 && p.dropout.p > 0 ? static_cast<T>(1.0 / (1.0 - p.dropout.p)) : T(1);
  const T *sums = part.row(kSum), *divisors = part.row(kStepsPerElement<E> > 1 ? kRounded : kSum);
  T inverse[kQueries], lse[kQueries];
  if (p.lse != nullptr) logsumexp<T>(part.row(kMaximum), sums, q.lanes, lse);
  for (int64_t i = 0; i < q.count; ++i) {
    const bool alive = !is_dead(part.row(kMaximum)[i], sums[i]);
    const T mean = alive ? 1 / sums[i] : T(0);
    inverse[i] = alive ? kept / divisors[i] + (sums[i] - sums[i]) : T(0);  // NaN where the sum is infinite
    if (p.mbar != nullptr) static_cast<T*>(p.mbar)[row + i] = alive ? part.row(kMbar)[i] * mean : T(0);
    if (task.eta != nullptr) task.eta[row + i] = alive ? part.row(kEta)[i] * mean : T(0);
    if (p.lse != nullptr) static_cast<T*>(p.lse)[row + i] = alive ? lse[i] : static_cast<T>(-__builtin_inf());
    if (p.normalizer != nullptr) {
      store_normalizer(static_cast<T*>(p.normalizer) + 2 * (row + i), alive, part.row(kMaximum)[i], sums[i]);
    }
  }
  if (p.out == nullptr) return;
  for (int64_t i = 0; i < q.count; ++i) {
    for (T* to = part.out + i * part.stride; to < part.out + (i + 1) * part.stride; to += kLanes<T>) store(to, load(to) * inverse[i]);
  }
  write_rows<T>(part.out, part.stride, q.count, n.Dv, p.out, p.scores.dtype, row * n.Dv, n.Dv);
  if (p.remainder != nullptr) write_remainders<T>(part.out, part.stride, q.count, n.Dv, p.out, p.remainder, p.scores.dtype, row * n.Dv);
}

}  // namespace smattn::cpu::SMATTN_UNIT
