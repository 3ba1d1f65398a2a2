// What backward's products read, laid out for them.
#pragma once

#include "cpu/backward_plan.h"

namespace smattn::cpu::SMATTN_UNIT {

// Query-side tiles of one pair and query block, and its rows.
template <class E>
struct QueryTiles {
  using T = SumOf<E>;

  E *query, *dout;  // as read_queries leaves them
  E *query_rows, *dout_rows, *query_step_memory, *dout_step_memory;
  Vectors<E> query_steps, dout_steps;  // for a sum over the queries
  RowExponents<T> exponents;
  T *delta, *mbar;
  int64_t b, h, first;  // what they hold; b is -1 before anything is read

  static int64_t size(const BackwardTask<T>& t, int64_t lanes) {
    int64_t size = 0;
    for (const int64_t part : sizes(t, lanes).of) size += part;
    return size;
  }

  // On `size` elements of memory.
  void place(const BackwardTask<T>& t, int64_t lanes, E* memory) {
    E* row_memory;
    E** const parts[kParts] = {&query, &dout, &query_rows, &dout_rows, &query_step_memory, &dout_step_memory, &row_memory};
    const PartSizes part_sizes = sizes(t, lanes);
    for (int i = 0; i < kParts; ++i) *parts[i] = memory, memory += part_sizes.of[i];
    T* rows = reinterpret_cast<T*>(row_memory);
    exponents = RowExponents<T>::on(rows, lanes);
    delta = rows + RowExponents<T>::kRows * lanes, mbar = delta + lanes;
    b = -1;
  }

  void read(const BackwardTask<T>& t, int64_t batch, int64_t head, const QueryBlock& q) {
    if (b == batch && h == head && first == q.first) return;
    b = batch, h = head, first = q.first;
    const Sizes& n = t.scores.size;
    const RowMajor<E> queries = read_queries<E>(t.scores.query, b, h, q, n.D, query_rows, query);
    query_steps = by_step(queries, q.count, n.D, query_step_memory);
    if (t.value.data != nullptr) {
      const RowMajor<E> douts = read_queries<E>(t.dout, b, h, q, n.Dv, dout_rows, dout);
      dout_steps = by_step(douts, q.count, n.Dv, dout_step_memory);
    }
    const int64_t row = (b * n.H + h) * n.Nq + q.first;
    const T weight = t.head_weights == nullptr ? T(1) : t.head_weights[h];
    for (int64_t i = 0; i < q.lanes; ++i) {
      const bool beyond = i >= q.count;
      delta[i] = beyond ? T(0) : weight * t.delta[row + i];
      mbar[i] = beyond || t.mbar == nullptr ? T(0) : t.mbar[row + i];
    }
    exponents.read(t.lse, t.normalizer, row, q.count, q.lanes, n.Nk);
  }

 private:
  static constexpr int kParts = 7;
  struct PartSizes {
    int64_t of[kParts];  // the parts, in the order in which they lie
  };
  static PartSizes sizes(const BackwardTask<T>& t, int64_t lanes) {
    const Sizes& n = t.scores.size;
    return {{lanes * row_elements<E>(n.D), lanes * row_elements<E>(n.Dv), copies(t.scores.query, n, n.D, lanes),
             copies(t.dout, n, n.Dv, lanes), steps_size<E>(lanes, n.D), steps_size<E>(lanes, n.Dv),
             (RowExponents<T>::kRows + 2) * lanes * static_cast<int64_t>(sizeof(T) / sizeof(E))}};
  }
  static int64_t copies(const Tensor4& rows, const Sizes& n, int64_t size, int64_t lanes) {
    return n.Nq % kLanes<T> == 0 && queries_in_place<E>(rows, size) ? 0 : lanes * row_elements<E>(size);
  }
};

// The key side: rows as they lie, and those of key for a sum over the keys.
template <class E>
struct KeyTiles {
  RowMajor<E> key, value;
  Vectors<E> key_steps;
};

}  // namespace smattn::cpu::SMATTN_UNIT
