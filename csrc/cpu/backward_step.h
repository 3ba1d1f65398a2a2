// One (batch, head) pair, query block and key block of backward: the five products of (6) and (7), and dM's and dalpha's share (8).
#pragma once

#include "cpu/backward_plan.h"

namespace smattn::cpu::SMATTN_LEVEL {

// dalpha is summed in this many places in turn, so that one addition need not wait for the last.
constexpr int kChains = 8;

// Where the step adds its results; null where not asked for.
template <class T>
struct Sums {
  T* dquery;  // [lane][D up to whole vectors], without scale
  T* dkey;    // [key][D up to whole vectors]
  T* dvalue;  // [key][Dv up to whole vectors]
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
template <class T>
struct QueryTiles {
  T *query_rows, *query;  // [lane][D] times scale, [D][lane] times scale * log2(e)
  T *dout_rows, *dout;    // [lane][Dv], [Dv][lane]
  T *lse_log2, *delta, *mbar;
  int64_t b, h, first;    // what they hold; b is -1 before anything is read

  static int64_t size(const Sizes& n, int64_t lanes) { return lanes * (2 * (round_up(n.D, kLanes<T>) + round_up(n.Dv, kLanes<T>)) + 3); }

  // On `size` elements of memory.
  void place(const Sizes& n, int64_t lanes, T* memory) {
    const int64_t D = lanes * round_up(n.D, kLanes<T>), Dv = lanes * round_up(n.Dv, kLanes<T>);
    query_rows = memory, query = query_rows + D, dout_rows = query + D, dout = dout_rows + Dv;
    lse_log2 = dout + Dv, delta = lse_log2 + lanes, mbar = delta + lanes;
    b = -1;
  }

  void read(const BackwardTask<T>& t, int64_t batch, int64_t head, const QueryBlock& q) {
    if (b == batch && h == head && first == q.first) return;
    b = batch, h = head, first = q.first;
    const Sizes& n = t.scores.size;
    scaled_query<T>(t.scores, b, h, q, query_rows, query);
    const T scale = static_cast<T>(t.scores.scale);
    for (int64_t i = 0; i < q.count * round_up(n.D, kLanes<T>); ++i) query_rows[i] *= scale;
    const int64_t row = (b * n.H + h) * n.Nq + q.first, stride = round_up(n.Dv, kLanes<T>);
    if (t.value.data != nullptr) {
      read_rows<T>(rows_of(t.dout, b, h, q.first), q.count, n.Dv, dout_rows, stride);
      fill<T>(dout_rows + q.count * stride, (q.lanes - q.count) * stride, T(0));
    }
    for (int64_t i = 0; i < q.lanes; ++i) {
      const bool beyond = i >= q.count;
      lse_log2[i] = beyond ? static_cast<T>(__builtin_inf()) : static_cast<T>(to_log2(t.lse[row + i]));  // so that P is 0
      delta[i] = beyond ? T(0) : t.delta[row + i];
      mbar[i] = beyond || t.mbar == nullptr ? T(0) : t.mbar[row + i];
    }
    if (t.value.data != nullptr) transpose_block<T>(dout_rows, stride, q.lanes, n.Dv, dout, q.lanes);
  }
};

template <class T>
class BackwardStep {
 public:
  explicit BackwardStep(const BackwardTask<T>& task)
      : t_(task), n_(task.scores.size), p_(kKeys * kQueries), dropped_(task.dropout.p > 0 ? kKeys * kQueries : 0),
        ds_(kKeys * kQueries), keep_(task.dropout.p > 0 ? kKeys * kQueries : 0) {}

  // mask, dmap: tiles, null where there is none.
  void run(int64_t h, const QueryBlock& q, const KeyBlock& k, const QueryTiles<T>& tiles, RowMajor<T> key, RowMajor<T> value, const T* mask,
           const T* dmap, const StepAhead& ahead, const Sums<T>& sums) {
    const T* keep = nullptr;
    if (t_.dropout.p > 0) {
      dropout_tile<T>(t_.dropout, tiles.b * n_.H + h, q, k, keep_);
      keep = keep_;
    }
    probabilities(h, q, k, tiles, key, mask, keep, ahead);
    const T* weights = keep != nullptr ? dropped_ : p_;
    if (t_.wants_ds()) score_gradients(h, q, k, tiles, value, mask, dmap, keep, ahead, sums);
    if (sums.dvalue != nullptr) add_rows(weights, q, k, tiles.dout_rows, n_.Dv, sums, sums.dvalue);
    if (sums.dkey != nullptr) add_rows(ds_, q, k, tiles.query_rows, n_.D, sums, sums.dkey);
    if (sums.dquery != nullptr) {
      const int64_t stride = round_up(n_.D, kLanes<T>);
      product(ColumnMajor<T>{ds_, q.lanes}, Vectors<T>{key.data, key.stride}, q.count, stride / kLanes<T>, k.count, Ahead{},
              [&](int64_t i, int64_t c, Vec<T> sum) {
                T* to = sums.dquery + i * stride + c * kLanes<T>;
                store(to, load(to) + sum);
              });
    }
  }

 private:
  // P (2), from the saved logsumexp, and P*C/(1-p).
  void probabilities(int64_t h, const QueryBlock& q, const KeyBlock& k, const QueryTiles<T>& tiles, RowMajor<T> key, const T* mask,
                     const T* keep, const StepAhead& ahead) {
    const bool padding = k.attended < k.count;
    score_tile<T>(key, tiles.query, n_.D, q, k, alpha_of<T>(t_.scores, h) * static_cast<T>(kLog2e), mask, ahead.values,
               [&](int64_t j, int64_t lane, Vec<T> s) {
                 const int64_t at = j * q.lanes + lane;
                 Vec<T> p = exp2<T>(s - load(tiles.lse_log2 + lane));
                 if (padding && k.padded[j]) p = Vec<T>{};  // where lse is NaN
                 store(p_ + at, p);
                 if (keep != nullptr) store(dropped_ + at, p * load(keep + at));
               });
  }

  // dS, and what is summed of it element by element.
  void score_gradients(int64_t h, const QueryBlock& q, const KeyBlock& k, const QueryTiles<T>& tiles, RowMajor<T> value, const T* mask,
                       const T* dmap, const T* keep, const StepAhead& ahead, const Sums<T>& sums) {
    const bool padding = k.attended < k.count;
    const T alpha = alpha_of<T>(t_.scores, h);
    const auto finish = [&](int64_t j, int64_t lane, Vec<T> dp) {
      const int64_t at = j * q.lanes + lane;
      if (keep != nullptr) dp *= load(keep + at);
      Vec<T> ds = load(p_ + at) * (dp - load(tiles.delta + lane));
      if (padding && k.padded[j]) ds = Vec<T>{};
      store(ds_ + at, ds);
      if (sums.dmask != nullptr) store(sums.dmask + at, sums.dmask_is_new ? alpha * ds : load(sums.dmask + at) + alpha * ds);
      if (sums.dalpha != nullptr) {
        T* to = sums.dalpha + (j % kChains) * kQueries + lane;
        store(to, load(to) + ds * (load(mask + at) - load(tiles.mbar + lane)));
      }
    };
    if (dmap == nullptr) {
      product(value, Vectors<T>{tiles.dout, q.lanes}, k.count, q.lanes / kLanes<T>, n_.Dv, ahead.next_keys,
              [&](int64_t j, int64_t c, Vec<T> dp) { finish(j, c * kLanes<T>, dp); });
      return;
    }
    for (int64_t j = 0; j < k.count; ++j) {
      for (int64_t lane = 0; lane < q.lanes; lane += kLanes<T>) finish(j, lane, t_.head_weights[h] * load(dmap + j * q.lanes + lane));
    }
  }

  // sum[key][.] += sum over the queries of weight[key][query] * rows[query][.]
  void add_rows(const T* weights, const QueryBlock& q, const KeyBlock& k, const T* rows, int64_t size, const Sums<T>& sums, T* sum) {
    const int64_t stride = round_up(size, kLanes<T>);
    product(RowMajor<T>{weights, q.lanes}, Vectors<T>{rows, stride}, k.count, stride / kLanes<T>, q.count, Ahead{},
            [&](int64_t j, int64_t c, Vec<T> x) {
              T* to = sum + j * stride + c * kLanes<T>;
              if (sums.dkv_is_final) return stream(to, x);
              store(to, sums.dkv_is_new ? x : load(to) + x);
            });
  }

  const BackwardTask<T>& t_;
  const Sizes& n_;
  Buffer<T> p_, dropped_, ds_, keep_;  // [key][lane]
};

}  // namespace smattn::cpu::SMATTN_LEVEL
