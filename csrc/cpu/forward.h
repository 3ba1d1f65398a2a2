// Forward, (1)-(4): online softmax over the key blocks, all the heads of a group inside one pass over a mask tile. Where queries are
// few the keys are split as well, and a second pass merges the parts.
#pragma once

#include "cpu/tiles/dropout.h"
#include "cpu/tiles/mask.h"
#include "cpu/tiles/tiles.h"
#include "cpu/workers.h"

namespace smattn::cpu::SMATTN_UNIT {

// What forward works on. It also takes means under P, as it does of M: of dA for the attention map's backward, eta of (10), or of dP where
// backward is to have delta of (5) without the output.
template <class T>
struct ForwardTask {
  ForwardParams params;
  Tensor4 dmap{};    // [B, 1, Nq, Nk], dA
  Tensor4 dout{};    // [B, H, Nq, Dv], what dP is made of; one of the two where there is eta
  T* eta = nullptr;  // [B, H, Nq]
};

// The rows that go with O: the maximum score, the sum of the probabilities relative to it, that of them as rounded to pairs, and the sums of
// their products with M and with what eta is the mean of.
enum Row { kMaximum, kSum, kRounded, kMbar, kEta, kRows };

// How forward is cut into items that run in parallel: (batch, group of heads, query block, split of the keys).
template <class E>
struct ForwardPlan {
  using T = typename SumOf<E>::type;

  Blocking<T> blocking;
  int64_t group_heads, groups, splits;

  explicit ForwardPlan(const Sizes& n) : blocking(n) {
    constexpr int64_t kGroupBytes = 256 << 10, kPartBytes = 8 << 20, kItems = 16;
    const int64_t head_bytes = blocking.queries * (n.D + n.Dv) * static_cast<int64_t>(sizeof(T));
    group_heads = smaller_of(n.H, larger_of<int64_t>(1, kGroupBytes / larger_of<int64_t>(head_bytes, 1)));
    groups = blocks_of(n.H, larger_of<int64_t>(group_heads, 1));
    const int64_t items = larger_of<int64_t>(1, n.B * groups * blocking.query_blocks);
    const int64_t part_bytes = larger_of<int64_t>(1, n.B * n.H * blocking.query_blocks * part_size(n) * static_cast<int64_t>(sizeof(T)));
    splits = smaller_of(smaller_of(blocks_of(kItems, items), larger_of<int64_t>(1, kPartBytes / part_bytes)),
                        larger_of<int64_t>(1, blocking.key_blocks));
  }

  // What one split leaves of one head and query block: O [lane][Dv], then kRows rows, each [lane]; of
  // pairs also what O lacks because the probabilities were rounded, [lane][Dv].
  int64_t part_size(const Sizes& n) const { return (kStepsPerElement<E> * round_up(n.Dv, kLanes<T>) + kRows) * blocking.queries; }
};

template <class E>
class Forward {
 public:
  using T = typename SumOf<E>::type;

  Forward(const ForwardTask<T>& task, const ForwardPlan<E>& plan)
      : t_(task), p_(task.params), s_(p_.scores), n_(s_.size), plan_(plan), Dvp_(round_up(n_.Dv, kLanes<T>)),
        wants_mbar_(p_.mbar != nullptr && s_.mask.data != nullptr), query_size_(row_elements<E>(n_.D) * kQueries),
        dout_size_(task.dout.data != nullptr ? row_elements<E>(n_.Dv) * kQueries : 0), queries_(plan.group_heads * query_size_),
        douts_(plan.group_heads * dout_size_), query_rows_(larger_of(query_size_, dout_size_)), part_size_(plan.part_size(n_)),
        part_((plan.splits == 1 ? plan.group_heads : 1) * part_size_), scores_(kKeys * kQueries), mask_(kKeys * kQueries),
        dmap_(task.eta != nullptr ? kKeys * kQueries : 0), keep_(p_.dropout.p > 0 ? kKeys * kQueries : 0), rows_(kQueries * kKeys),
        keys_(kKeys * row_elements<E>(n_.D)), values_(kKeys * row_elements<E>(n_.Dv)),
        value_steps_memory_(kStepsPerElement<E> > 1 ? packed<E>(kKeys) * Dvp_ : 0),
        weights_(kStepsPerElement<E> > 1 ? packed<E>(kKeys) * kQueries : 0), rests_(wants_rest() ? packed<E>(kKeys) * kQueries : 0) {}

  int64_t bytes() const {
    return bytes_in(queries_, douts_, query_rows_, part_, scores_, mask_, dmap_, keep_, rows_, keys_, values_, value_steps_memory_,
                    weights_, rests_);
  }

  // One item; the result goes to `parts` ([head][part] of this item's query block and split), or where there is one split to the outputs.
  void run(int64_t b, int64_t group, int64_t query_index, int64_t split, T* parts) {
    const QueryBlock q = query_block(plan_.blocking, query_index);
    const int64_t first = group * plan_.group_heads, heads = smaller_of(plan_.group_heads, n_.H - first);
    T* const part = plan_.splits == 1 ? part_.get() : parts + first * part_size_;
    const bool other_queries = queries_read_.differs(b, group, query_index, 0);  // than in the last split
    for (int64_t h = 0; h < heads; ++h) {
      if (other_queries) read_queries<E>(s_.query, b, first + h, q, n_.D, static_cast<T>(s_.scale * kLog2e), query_rows_, query(h));
      if (other_queries && t_.dout.data != nullptr) read_queries<E>(t_.dout, b, first + h, q, n_.Dv, T(1), query_rows_, dout(h));
      fill<T>(part + h * part_size_, part_size_, T(0));
      fill<T>(part + h * part_size_ + q.lanes * Dvp_, q.lanes, static_cast<T>(-__builtin_inf()));
    }
    const int64_t blocks = plan_.blocking.key_blocks;
    for (int64_t kb = blocks * split / plan_.splits; kb < blocks * (split + 1) / plan_.splits; ++kb) {
      const KeyBlock k = key_block(s_, plan_.blocking, b, kb);
      if (k.attended == 0) continue;
      const T* mask = s_.mask.data != nullptr ? mask_.get() : nullptr;
      if (t_.dmap.data != nullptr) read_tile<T>(t_.dmap, b, 0, q, k, rows_, dmap_);
      for (int64_t h = 0; h < heads; ++h) {
        const bool another = h == 0 || s_.mask_size[1] > 1;
        if (mask != nullptr && another) read_mask<T>(s_, b, first + h, q, k, rows_, mask_);
        const bool same_keys = h > 0 && kv_head(n_, first + h) == kv_head(n_, first + h - 1);
        const bool last = h == heads - 1;
        const Prefetch next =
            keys_ahead(s_.key, n_, b, last ? first : first + h + 1, last ? k.first + k.count : k.first, plan_.blocking.keys, n_.D);
        attend(b, first + h, q, k, mask, same_keys, query(h), dout(h), part + h * part_size_, next);
      }
    }
    for (int64_t h = 0; plan_.splits == 1 && h < heads; ++h) write(b, first + h, q, part + h * part_size_);
  }

  // The splits' parts of one head and query block, `stride` apart, into one, in their order.
  void merge(int64_t b, int64_t h, int64_t query_index, const T* parts, int64_t stride) {
    const QueryBlock q = query_block(plan_.blocking, query_index);
    T* to = part_;
    const int64_t max_row = q.lanes * Dvp_, sums = max_row + kSum * q.lanes, end = max_row + kRows * q.lanes;
    fill<T>(to, part_size_, T(0));
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      Vec<T> m = broadcast(static_cast<T>(-__builtin_inf()));
      for (int64_t s = 0; s < plan_.splits; ++s) m = larger(m, load(parts + s * stride + max_row + lane));
      store(to + max_row + lane, m);
    }
    T weight[kQueries];
    for (int64_t s = 0; s < plan_.splits; ++s) {
      const T* from = parts + s * stride;
      for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
        const Vec<T> w = exp2<T>(load(from + max_row + lane) - finite_maximum(load(to + max_row + lane)));
        store(weight + lane, w);
        for (int64_t at = sums + lane; at < end; at += q.lanes) store(to + at, load(to + at) + w * load(from + at));
      }
      add_rows(q, weight, from, to);
      if (wants_rest()) add_rows(q, weight, from + end, to + end);
    }
    write(b, h, q, to);
  }

 protected:  // of a study as well, bench/skipping.cpp
  // Whether rounding the probabilities would show in a gradient of M that is not rounded so: backward's delta, made of the unrounded
  // output, is then to be the mean of dP under P itself. Else it is that under the rounded ones, which cancels a dP that is the same for
  // all keys as well.
  bool wants_rest() const {
    return kStepsPerElement<E> > 1 && p_.out_acc != nullptr && s_.mask.data != nullptr && s_.mask.dtype != s_.dtype;
  }

  void add_rows(const QueryBlock& q, const T* weight, const T* from, T* to) const {
    for (int64_t i = 0; i < q.count; ++i) {
      for (int64_t at = i * Dvp_; at < (i + 1) * Dvp_; at += kLanes<T>) store(to + at, load(to + at) + weight[i] * load(from + at));
    }
  }

  E* weights() {
    if constexpr (kStepsPerElement<E> == 1) return scores_;
    return weights_;
  }
  E* query(int64_t h) { return queries_ + h * query_size_; }
  E* dout(int64_t h) { return douts_ + h * dout_size_; }

  // What to subtract: infinities less themselves would be NaN. The sum of a row whose maximum is +inf is so as well, or NaN, and its out NaN.
  static Vec<T> finite_maximum(Vec<T> m) { return m - m == T(0) ? m : Vec<T>{}; }

  // One head against one key block.
  void attend(int64_t b, int64_t h, const QueryBlock& q, const KeyBlock& k, const T* mask, bool same_keys, const E* query, const E* dout,
              T* part, const Prefetch& next_keys) {
    const int64_t g = kv_head(n_, h);
    if (!same_keys) {
      key_ = read_keys<E>(s_.key, b, g, k, n_.D, keys_);
      value_ = read_keys<E>(p_.value, b, g, k, n_.Dv, values_, kLanes<E>);
    }
    T maxima[kQueries];
    copy<T>(part + q.lanes * Dvp_, q.lanes, maxima);
    scores(h, q, k, mask, query, keys_ahead(p_.value, n_, b, h, k.first, k.count, n_.Dv), maxima);
    const T* keep = nullptr;
    if (p_.dropout.p > 0) {
      dropout_tile<T>(p_.dropout, b * n_.H + h, q, k, keep_);
      keep = keep_;
    }
    if (t_.dout.data != nullptr) {
      dot_products(value_, dout, q, k.count, n_.Dv, next_keys, dmap_.get());
      const int64_t size = keep == nullptr ? 0 : k.count * q.lanes;
      for (int64_t at = 0; at < size; at += kLanes<T>) store(dmap_ + at, load(dmap_ + at) * load(keep + at));
    }
    T rescale[kQueries];
    for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
      softmax(q, k, lane, wants_mbar_ ? mask : nullptr, load(maxima + lane), part + q.lanes * Dvp_, rescale);
    }
    if (keep != nullptr) drop(q, k, keep, weights());
    if (keep != nullptr && wants_rest()) drop(q, k, keep, rests_);
    if (p_.out == nullptr) return;
    if (!same_keys) value_steps_ = by_step(value_, k.count, n_.Dv, value_steps_memory_.get());  // by now they have been fetched
    const auto add = [&](const E* w, T* to, const Prefetch& ahead) {
      product(ColumnMajor<E>{w, q.lanes}, value_steps_, q.count, Dvp_ / kLanes<T>, packed<E>(k.count), ahead,
              [to, stride = Dvp_, factor = &rescale[0]]<int N>(int64_t i, int64_t c, const Vec<T>(&sums)[N]) {
                T* out = to + i * stride + c * kLanes<T>;
                for (int v = 0; v < N; ++v, out += kLanes<T>) store(out, load(out) * factor[i] + sums[v]);
              });
    };
    add(weights(), part, next_keys);
    if (wants_rest()) add(rests_, part + q.lanes * (Dvp_ + kRows), Prefetch{});
  }

  // Scores to weights for one vector of queries, `N` keys at a time; pointers to its lanes, `stride` from key to key (or pair).
  struct Weighing {
    const T *scores, *mask, *dmap;
    E *weights, *rests;
    int64_t stride, keys;
    Vec<T> subtracted, sum{}, rounded{}, mbar{}, eta{};

    template <int N, bool kWhole>  // else the last of them may lie beyond the keys
    void next(int64_t j) {
      Vec<T> p[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) p[i] = load(scores + (j + i) * stride) - subtracted;
      exp2_each<T, N>(p);
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
          const Vec<T> first = (Vec<T>)(pair << 16), second = (Vec<T>)(pair >> 16 << 16);
          rounded += first + second;
          if (rests != nullptr) store(rests + (j + i) / 2 * stride, paired(p[i] - first, p[i + 1] - second));
        }
      }
    }
  };

  // The exponents of one head's scores, strip by strip; raises each query's maximum to theirs.
  void scores(int64_t h, const QueryBlock& q, const KeyBlock& k, const T* mask, const E* query, const Prefetch& ahead, T* maxima) {
    const Exponents<E> exponent(s_, h, mask);
    const int64_t keys = strip_keys<T>(q.lanes);
    for (int64_t first = 0; first < k.count; first += keys) {
      const int64_t end = smaller_of(first + keys, k.count);
      dot_products(key_.from_row(first), query, q, end - first, n_.D, ahead.part(first, end - first, k.count), scores_ + first * q.lanes);
      for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
        store(maxima + lane, exponents(exponent, q.lanes, k, first, end, lane, load(maxima + lane)));
      }
    }
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

  // Exponents to probabilities (not yet divided by their sum) for one vector of queries, m their maximum so far; rows: kRows of them.
  [[gnu::noinline]] void softmax(const QueryBlock& q, const KeyBlock& k, int64_t lane, const T* mask, Vec<T> m, T* rows, T* rescale) {
    const auto row_of = [&](Row row) { return rows + row * q.lanes + lane; };
    const Vec<T> before = load(row_of(kMaximum)), subtracted = finite_maximum(m);
    Weighing w{.scores = scores_ + lane,
               .mask = mask == nullptr ? nullptr : mask + lane,
               .dmap = t_.eta == nullptr ? nullptr : dmap_ + lane,
               .weights = weights() + lane,
               .rests = wants_rest() ? rests_ + lane : nullptr,
               .stride = q.lanes,
               .keys = k.count,
               .subtracted = subtracted};
    int64_t j = 0;
    for (; j + kExpAtOnce <= k.count; j += kExpAtOnce) w.template next<kExpAtOnce, true>(j);
    for (; j < k.count; j += kStepsPerElement<E>) w.template next<kStepsPerElement<E>, false>(j);
    const Vec<T> factor = exp2<T>(before - subtracted);
    store(rescale + lane, factor);
    store(row_of(kMaximum), m);
    const auto add = [&](Row row, Vec<T> x) { store(row_of(row), load(row_of(row)) * factor + x); };
    add(kSum, w.sum), add(kRounded, w.rounded), add(kMbar, w.mbar), add(kEta, w.eta);
  }

  // The weights times C/(1-p), of pairs times C.
  void drop(const QueryBlock& q, const KeyBlock& k, const T* keep, E* weights) const {
    for (int64_t j = 0; j < k.count; j += kStepsPerElement<E>) {
      for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) {
        const T* kept = keep + j * q.lanes + lane;
        E* weight = weights + j / kStepsPerElement<E> * q.lanes + lane;
        if constexpr (kStepsPerElement<E> == 1) {
          store(weight, load(weight) * load(kept));
        } else {
          store(weight, chosen(load(weight), load(kept) != T(0), load(kept + q.lanes) != T(0)));
        }
      }
    }
  }

  // Divides by the row sums and stores what was asked for. A row without a key: its out is 0 and its lse -inf. Where there are keys
  // and all score -inf, the sum is 0 as well, and out NaN, as in any softmax.
  void write(int64_t b, int64_t h, const QueryBlock& q, T* part) {
    T* rows = part + q.lanes * Dvp_;
    const int64_t row = (b * n_.H + h) * n_.Nq + q.first;
    const bool alive = has_keys(s_, b);
    const T kept =
        kStepsPerElement<E> > 1 && p_.dropout.p > 0 ? static_cast<T>(1.0 / (1.0 - p_.dropout.p)) : T(1);  // the others' weights have it
    T inverse[kQueries];
    for (int64_t i = 0; i < q.count; ++i) {
      const auto at = [&](Row which) { return rows[which * q.lanes + i]; };
      const T mean = alive ? 1 / at(kSum) : T(0);
      inverse[i] =
          alive ? kept / at(kStepsPerElement<E> > 1 ? kRounded : kSum) + (at(kSum) - at(kSum)) : T(0);  // NaN where the sum is infinite
      if (p_.mbar != nullptr) static_cast<T*>(p_.mbar)[row + i] = at(kMbar) * mean;
      if (t_.eta != nullptr) t_.eta[row + i] = at(kEta) * mean;
      if (p_.lse == nullptr) continue;
      const double lse = to_natural(static_cast<double>(at(kMaximum))) + __builtin_log(static_cast<double>(at(kSum)));
      static_cast<T*>(p_.lse)[row + i] = static_cast<T>(lse);
    }
    if (p_.out == nullptr) return;
    for (int64_t i = 0; i < q.count; ++i) {
      for (int64_t d = 0; d < n_.Dv; ++d) part[i * Dvp_ + d] *= inverse[i];
    }
    write_rows<T>(part, Dvp_, q.count, n_.Dv, p_.out, s_.dtype, row * n_.Dv, n_.Dv);
    const T* rest = rows + kRows * q.lanes;
    for (int64_t i = 0; wants_rest() && alive && i < q.count; ++i) {
      const T sum = rows[kSum * q.lanes + i], again = rows[kRounded * q.lanes + i] / sum;
      for (int64_t d = 0; d < n_.Dv; ++d) part[i * Dvp_ + d] = part[i * Dvp_ + d] * again + rest[i * Dvp_ + d] * (kept / sum);
    }
    if (p_.out_acc != nullptr) write_rows<T>(part, Dvp_, q.count, n_.Dv, p_.out_acc, DTypeOf<T>::value, row * n_.Dv, n_.Dv);
  }

  const ForwardTask<T>& t_;
  const ForwardParams& p_;
  const Scores& s_;
  const Sizes& n_;
  const ForwardPlan<E>& plan_;
  const int64_t Dvp_;
  const bool wants_mbar_;
  const int64_t query_size_, dout_size_;
  Buffer<E> queries_;  // [head of the group][D][lanes], scaled unless of pairs
  Buffer<E> douts_;    // [head of the group][Dv][lanes]
  Buffer<E> query_rows_;
  const int64_t part_size_;
  Buffer<T> part_;     // [head of the group], where there is one split; else one, to merge into
  Buffer<T> scores_;   // [key][lane], then the probabilities, unless of pairs
  Buffer<T> mask_;     // [key][lane]
  Buffer<T> dmap_;     // [key][lane], dA or dP
  Buffer<T> keep_;     // [key][lane], C/(1-p)
  Buffer<T> rows_;
  Buffer<E> keys_, values_;  // copies of those that cannot be read as they lie
  Buffer<E> value_steps_memory_;
  Buffer<E> weights_;  // the probabilities as pairs of keys
  Buffer<E> rests_;    // what rounding took from them
  RowMajor<E> key_{}, value_{};
  Vectors<E> value_steps_{};
  Held queries_read_;
};

template <class E, class T>
inline void forward_pass(const ForwardTask<T>& task, ParallelFor threads) {
  const Sizes& n = task.params.scores.size;
  const ForwardPlan<E> plan(n);
  const int64_t query_blocks = plan.blocking.query_blocks;
  const int64_t per_query_block = n.H * plan.part_size(n);  // parts of one (split, batch, query block)
  const int64_t per_split = n.B * query_blocks * per_query_block;
  const Buffer<T> parts(plan.splits > 1 ? plan.splits * per_split : 0);
  const auto make = [&] { return Forward<E>(task, plan); };
  const int64_t spare = kSpare - parts.bytes(), items = n.B * plan.groups * query_blocks * plan.splits;
  for_each_item(threads, items, spare, make, [&](Forward<E>& forward, int64_t item) {
    const int64_t split = item % plan.splits, qb = item / plan.splits % query_blocks;
    const int64_t group = item / (plan.splits * query_blocks) % plan.groups, b = item / (plan.splits * query_blocks * plan.groups);
    forward.run(b, group, qb, split, parts + split * per_split + (b * query_blocks + qb) * per_query_block);
  });
  if (plan.splits == 1) return;
  for_each_item(threads, n.B * query_blocks * n.H, spare, make, [&](Forward<E>& forward, int64_t item) {
    const int64_t h = item % n.H, qb = item / n.H % query_blocks, b = item / (n.H * query_blocks);
    forward.merge(b, h, qb, parts + item * plan.part_size(n), per_split);
  });
}

template <class E>
inline void forward_of(const ForwardParams& params, ParallelFor threads) {
  forward_pass<E>(ForwardTask<typename SumOf<E>::type>{.params = params}, threads);
}

}  // namespace smattn::cpu::SMATTN_UNIT
