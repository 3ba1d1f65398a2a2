// One (batch, head) pair, query block and key block of backward: the five products of (6) and (7), and dM's and dalpha's share (8).
#pragma once

#include "cpu/backward_plan.h"
#include "cpu/dropout_tile.h"

namespace smattn::cpu::SMATTN_LEVEL {

// dalpha is summed in this many places in turn, so that one addition need not wait for the last.
constexpr int kChains = 8;

// Where the step adds its results; null where not asked for.
template <class T>
struct Sums {
  T* dquery;  // [lane][D up to whole vectors], without scale
  void* dkey;    // of T, [key][D up to whole vectors]
  void* dvalue;  // of T, [key][Dv up to whole vectors]
  bool dkv_is_new;  // nothing there yet to add to
  bool dkv_is_final;  // and nothing comes after: dkey and dvalue are the outputs themselves
  T* dmask;   // [key][lane]
  bool dmask_is_new;
  T* dalpha;  // [kChains][lane]
};

// What to fetch meanwhile.
struct StepAhead {
  Ahead values, next_keys;
};

// Query-side tiles of one pair and query block, and its rows.
template <class E>
struct QueryTiles {
  using T = typename SumOf<E>::type;

  E* query;               // [D][lane], times scale * log2(e) unless of pairs
  E* dout;                // [Dv][lane]
  E *query_rows, *dout_rows;
  Vectors<E> query_steps;  // for a sum over the queries, times scale unless of pairs
  Vectors<E> dout_steps;
  T *lse_log2, *delta, *mbar;
  int64_t b, h, first;    // what they hold; b is -1 before anything is read

  static int64_t size(const Sizes& n, int64_t lanes) {
    return (kPack<E> + 1) * lanes * (row_elements<E>(n.D) + row_elements<E>(n.Dv)) + 3 * lanes * static_cast<int64_t>(sizeof(T) / sizeof(E));
  }

  // On `size` elements of memory.
  void place(const Sizes& n, int64_t lanes, E* memory) {
    const int64_t D = lanes * row_elements<E>(n.D), Dv = lanes * row_elements<E>(n.Dv);
    query = memory, dout = query + D, query_rows = dout + Dv, dout_rows = query_rows + D;
    query_steps.data = kPack<E> == 1 ? query_rows : dout_rows + Dv;
    dout_steps.data = kPack<E> == 1 ? dout_rows : query_steps.data + D;
    lse_log2 = reinterpret_cast<T*>(memory + (kPack<E> + 1) * (D + Dv)), delta = lse_log2 + lanes, mbar = delta + lanes;
    b = -1;
  }

  void read(const BackwardTask<T>& t, int64_t batch, int64_t head, const QueryBlock& q) {
    if (b == batch && h == head && first == q.first) return;
    b = batch, h = head, first = q.first;
    const Sizes& n = t.scores.size;
    read_queries<E>(t.scores.query, b, h, q, n.D, static_cast<T>(t.scores.scale * kLog2e), query_rows, query);
    if constexpr (kPack<E> == 1) {
      for (int64_t i = 0; i < q.count * row_elements<E>(n.D); ++i) query_rows[i] *= static_cast<T>(t.scores.scale);
    }
    query_steps = by_step(RowMajor<E>{query_rows, row_elements<E>(n.D)}, q.count, n.D, const_cast<E*>(query_steps.data));
    if (t.value.data != nullptr) {
      read_queries<E>(t.dout, b, h, q, n.Dv, T(1), dout_rows, dout);
      dout_steps = by_step(RowMajor<E>{dout_rows, row_elements<E>(n.Dv)}, q.count, n.Dv, const_cast<E*>(dout_steps.data));
    }
    const int64_t row = (b * n.H + h) * n.Nq + q.first;
    for (int64_t i = 0; i < q.lanes; ++i) {
      const bool beyond = i >= q.count;
      lse_log2[i] = beyond ? static_cast<T>(__builtin_inf()) : static_cast<T>(exponent_of(t.lse[row + i]));  // so that P is 0
      delta[i] = beyond ? T(0) : t.delta[row + i];
      mbar[i] = beyond || t.mbar == nullptr ? T(0) : t.mbar[row + i];
    }
  }
};

// The key side: rows as they lie, and those of key for a sum over the keys.
template <class E>
struct KeyTiles {
  RowMajor<E> key, value;
  Vectors<E> key_steps;
};

template <class E>
class BackwardStep {
 public:
  using T = typename SumOf<E>::type;

  explicit BackwardStep(const BackwardTask<T>& task)
      : t_(task), n_(task.scores.size), p_(kKeys * kQueries), keep_(task.dropout.p > 0 ? kKeys * kQueries : 0),
        weights_(kPack<E> > 1 || task.dropout.p > 0 ? kKeys * kQueries : 0), ds_(kKeys * kQueries) {}

  int64_t bytes() const { return bytes_in(p_, keep_, weights_, ds_); }

  // mask, dmap: tiles, null where there is none.
  void run(int64_t h, const QueryBlock& q, const KeyBlock& k, const QueryTiles<E>& tiles, const KeyTiles<E>& keys, const T* mask,
           const T* dmap, const StepAhead& ahead, const Sums<T>& sums) {
    const T* keep = nullptr;
    if (t_.dropout.p > 0) {
      dropout_tile<T>(t_.dropout, tiles.b * n_.H + h, q, k, keep_);
      keep = keep_;
    }
    probabilities(h, q, k, tiles, keys.key, mask, keep, ahead);
    if (t_.wants_ds()) score_gradients(h, q, k, tiles, keys.value, mask, dmap, keep, ahead, sums);
    if (sums.dvalue != nullptr) {
      RowMajor<E> weights = weights_.by_lane(q.lanes);
      if constexpr (kPack<E> == 1) {
        if (keep == nullptr) weights.data = p_;
      }
      add_rows(weights, q, k, tiles.dout_steps, n_.Dv, T(1), sums, sums.dvalue);
    }
    if (sums.dkey != nullptr) add_rows(ds_.by_lane(q.lanes), q, k, tiles.query_steps, n_.D, static_cast<T>(t_.scores.scale), sums, sums.dkey);
    if (sums.dquery != nullptr) {
      const int64_t stride = round_up(n_.D, kLanes<T>);
      product(ds_.by_key(k.count, q.lanes), keys.key_steps, q.count, stride / kLanes<T>, packed<E>(k.count), Ahead{},
              [dquery = sums.dquery, stride](int64_t i, int64_t c, Vec<T> sum) {
                T* to = dquery + i * stride + c * kLanes<T>;
                store(to, load(to) + sum);
              });
    }
  }

 private:
  // P (2), from the saved logsumexp, and P*C/(1-p).
  void probabilities(int64_t h, const QueryBlock& q, const KeyBlock& k, const QueryTiles<E>& tiles, RowMajor<E> key, const T* mask,
                     const T* keep, const StepAhead& ahead) {
    const bool* padded = k.attended < k.count ? k.padded : nullptr;
    score_tile(t_.scores, h, key, tiles.query, q, k, mask, ahead.values,
               [padded, keep, lanes = q.lanes, lse = tiles.lse_log2, to = p_.get(), weights = weights_.get()](int64_t j, int64_t lane, Vec<T> s) {
                 const int64_t at = j * lanes + lane;
                 Vec<T> p = exp2<T>(s - load(lse + lane));
                 if (padded != nullptr && padded[j]) p = Vec<T>{};  // where lse is NaN
                 store(to + at, p);
                 if (keep != nullptr) {
                   WeightTile<E>::put(weights, at, p * load(keep + at));
                 } else if constexpr (kPack<E> > 1) {
                   WeightTile<E>::put(weights, at, p);
                 }
               });
  }

  // dS, and what is summed of it element by element.
  void score_gradients(int64_t h, const QueryBlock& q, const KeyBlock& k, const QueryTiles<E>& tiles, RowMajor<E> value, const T* mask,
                       const T* dmap, const T* keep, const StepAhead& ahead, const Sums<T>& sums) {
    const bool* padded = k.attended < k.count ? k.padded : nullptr;
    const auto finish = [padded, keep, mask, lanes = q.lanes, alpha = alpha_of<T>(t_.scores, h), p = p_.get(), to = ds_.get(),
                         delta = tiles.delta, mbar = tiles.mbar, dmask = sums.dmask, dmask_is_new = sums.dmask_is_new,
                         dalpha = sums.dalpha](int64_t j, int64_t lane, Vec<T> dp) {
      const int64_t at = j * lanes + lane;
      if (keep != nullptr) dp *= load(keep + at);
      Vec<T> ds = load(p + at) * (dp - load(delta + lane));
      if (padded != nullptr && padded[j]) ds = Vec<T>{};
      WeightTile<E>::put(to, at, ds);
      if (dmask != nullptr) store(dmask + at, dmask_is_new ? alpha * ds : load(dmask + at) + alpha * ds);
      if (dalpha != nullptr) {
        T* sum = dalpha + (j % kChains) * kQueries + lane;
        store(sum, load(sum) + ds * (load(mask + at) - load(mbar + lane)));
      }
    };
    if (dmap == nullptr) {
      product(value, Vectors<E>{tiles.dout, q.lanes}, k.count, q.lanes / kLanes<T>, packed<E>(n_.Dv), ahead.next_keys,
              [finish](int64_t j, int64_t c, Vec<T> dp) { finish(j, c * kLanes<T>, dp); });
      return;
    }
    for (int64_t j = 0; j < k.count; ++j) {
      for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) finish(j, lane, t_.head_weights[h] * load(dmap + j * q.lanes + lane));
    }
  }

  // sum[key][.] += sum over the queries of weight[key][query] * rows[query][.], of pairs times `factor`
  void add_rows(RowMajor<E> weights, const QueryBlock& q, const KeyBlock& k, Vectors<E> rows, int64_t size, T factor, const Sums<T>& sums,
                void* sum) {
    const int64_t stride = round_up(size, kLanes<T>);
    product(weights, rows, k.count, stride / kLanes<T>, packed<E>(q.count), Ahead{},
            [sum, stride, factor, is_new = sums.dkv_is_new, is_final = sums.dkv_is_final](int64_t j, int64_t c, Vec<T> x) {
              const int64_t at = j * stride + c * kLanes<T>;
              if constexpr (kPack<E> > 1) x *= factor;
              if (is_final) return stream_at<E>(sum, at, x);
              T* to = static_cast<T*>(sum) + at;
              store(to, is_new ? x : load(to) + x);
            });
  }

  const BackwardTask<T>& t_;
  const Sizes& n_;
  Buffer<T> p_, keep_;  // [key][lane]
  WeightTile<E> weights_, ds_;  // P*C/(1-p) where that is not p_, dS
};

}  // namespace smattn::cpu::SMATTN_LEVEL
