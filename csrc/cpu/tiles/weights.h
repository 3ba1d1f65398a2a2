// From scores to the weights of a softmax, which forward and the attention map share: exponents of 2, then their powers and sums.
#pragma once

#include "cpu/tiles/tiles.h"

namespace smattn::cpu::SMATTN_UNIT {

// A block's exponents, a padded key's -inf, as a tile; raises each query's maximum to theirs. query: what read_queries made.
template <class E, class T>
inline void exponents_of(const Exponents<E>& exponent, const QueryBlock& q, const KeyBlock& k, RowMajor<E> key, const E* query, int64_t D,
                         const Prefetch& ahead, T* maxima, T* tile) {
  const bool* padded = k.attended < k.count ? k.padded : nullptr;
  dot_products(key, query, q, k.count, D, ahead,
               [exponent, padded, maxima, tile, stride = q.lanes]<int R, int N>(int64_t j, int64_t c, const Vec<T>(&products)[R][N]) {
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
                     store(tile + at + v * kLanes<T>, x);
                     maximum[v] = larger(maximum[v], x);
                   }
                 }
                 for (int v = 0; v < N; ++v) store(maxima + (c + v) * kLanes<T>, maximum[v]);
               });
}

// Scores to weights for one vector of queries, `N` keys at a time; pointers to its lanes, `stride` from key to key (or pair).
template <class E>
struct Weighing {
  using T = SumOf<E>;

  const T *scores, *mask, *dmap;  // mask, dmap: null where they are not averaged
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

  void run() {
    int64_t j = 0;
    for (; j + kExpAtOnce <= keys; j += kExpAtOnce) next<kExpAtOnce, true>(j);
    for (; j < keys; j += kStepsPerElement<E>) next<kStepsPerElement<E>, false>(j);
  }
};

}  // namespace smattn::cpu::SMATTN_UNIT
