// Forward, reference.py (1)-(4): a block attends with one block of queries of one (batch, head) to one range of keys, by the online
// softmax. With few queries its warps share the queries and part the keys; with one range a block finishes its rows, with several it
// leaves them to forward_merge.h. Heads are the fastest index of the grid, so that those that share a tile of M read it together.
// Without a value only the rows are computed: lse, mbar, and eta of (10).
#pragma once

#include <type_traits>

#include "work.h"

namespace smattn::cuda {

template <class Math, int D>
struct ForwardShape {
  static constexpr int kRowBytes = D * sizeof(typename Math::Element);
  static constexpr int kKeys = kRowBytes <= 256 ? 64 : 16384 / kRowBytes;
  static constexpr int kWarps = kRowBytes <= 512 ? 4 : 2;
  static constexpr bool kHasFew = kRowBytes <= 256;  // a variant whose warps share 16 queries and part the keys
  static constexpr int queries(bool few) { return few ? 16 : 16 * kWarps; }
  static constexpr size_t shared_bytes(bool few) { return static_cast<size_t>((queries(few) + 4 * kKeys) * kRowBytes); }
};

// In base 2. A row whose largest score is below has no key to attend to: scores below -2.3e38 count as -inf, in every dtype.
constexpr float kLowestScore = -2.3e38f * kLog2E;

// What is subtracted from scores whose largest is `top`: where that is infinite, infinities stay what they are.
SMATTN_DEVICE float finite(float top) { return fabsf(top) == infinity() ? 0.0f : top; }

// factor * sum, but 0 where factor is 0: a sum of M over keys whose weight has vanished may be infinite.
SMATTN_DEVICE float rescaled(float factor, float sum) { return factor == 0.0f ? 0.0f : factor * sum; }

// What rounding took from sum = before + added. Where the weights of a row are nearly the same, so is what each tile adds, and thousands of
// roundings to the same side add up.
SMATTN_DEVICE float lost_by(float sum, float before, float added) { return added - (sum - before); }
// A sum and what it lost. An infinite one has lost NaN, and stays infinite.
SMATTN_DEVICE float with_lost(float sum, float lost) { return lost == lost ? sum + lost : sum; }

// One warp's online softmax over its rows.
template <int D>
struct Softmax {
  float m[2] = {-infinity(), -infinity()}, l[2] = {0.0f, 0.0f}, average[2][2] = {};
  float rounded[2] = {0.0f, 0.0f};  // the lane's part of l's sum, of the weights as V is multiplied by them: of 16-bit types alone
  float lost[2] = {0.0f, 0.0f};     // what rounding has taken from l: of float32 alone
  Tile<D> out;

  // s becomes exp2(s - m), what is summed already is rescaled.
  template <class T, int COLS>
  SMATTN_DEVICE void step(Tile<COLS>& s) {
    float top[2] = {m[0], m[1]}, sum[2] = {0.0f, 0.0f}, rescale[2];
    s.for_each([&](float& x, int half, int) { top[half] = fmaxf(top[half], x); });
    SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      m[half] = rescale_to(half, row_max(top[half]), rescale[half]);
      top[half] = finite(m[half]);
    }
    s.for_each([&](float& x, int half, int) {
      x = exp2_fast(x - top[half]);
      sum[half] += x;
    });
    SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float added = row_sum(sum[half]);
      if constexpr (sizeof(T) == 4) {
        const float before = fmaf(l[half], rescale[half], 0.0f);  // rounded by itself
        l[half] = before + added;
        lost[half] = fmaf(lost[half], rescale[half], lost_by(l[half], before, added));
      } else {
        l[half] = l[half] * rescale[half] + added;
      }
    }
    out.scale_rows(rescale);
  }

  // Before V is multiplied by p. Weights of float16 are scaled first, or many small ones would be rounded to 0; `settle` undoes it.
  template <class T, int COLS>
  SMATTN_DEVICE void add_weights(Tile<COLS>& p) {
    if constexpr (std::is_same_v<T, Half>) p.for_each([](float& x, int, int) { x *= 0x1p15f; });
    if constexpr (sizeof(T) == 2) p.for_each([&](float& x, int half, int) { rounded[half] += to_float(smattn::cuda::rounded<T>(x)); });
  }

  // After the last key. Of 16 bits, out is a mean of V, weighted by the rounded weights, times l. So it is a mean wherever l divides it,
  // and delta (5), made of it, cancels a dP that is the same for all keys.
  template <class T>
  SMATTN_DEVICE void settle() {
    if constexpr (sizeof(T) == 2) {
      float factor[2];
      SMATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float sum = row_sum(rounded[half]);
        factor[half] = sum == 0.0f ? 1.0f : l[half] / sum;
      }
      out.scale_rows(factor);
    } else {
      SMATTN_UNROLL
      for (int half = 0; half < 2; ++half) l[half] = with_lost(l[half], lost[half]);
    }
  }

  // The factor that takes sums from the old largest score to a new one; rows' averages are multiplied by it.
  SMATTN_DEVICE float rescale_to(int half, float top, float& factor) {
    factor = exp2_fast(m[half] - finite(top));
    rounded[half] *= factor;
    average[0][half] = rescaled(factor, average[0][half]);
    average[1][half] = rescaled(factor, average[1][half]);
    return top;
  }

  template <int COLS>
  SMATTN_DEVICE void add_average(int which, Tile<COLS>& p, Tile<COLS>& x) {
    float sum[2] = {0.0f, 0.0f};
    p.for_each_with(x, [&](float& p, float& x, int half, int) { sum[half] = fmaf(p, x, sum[half]); });
    SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) average[which][half] += row_sum(sum[half]);
  }

  // Everything a lane holds, in a fixed order.
  template <class Each>
  SMATTN_DEVICE void for_each(const Each& each) {
    SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      each(m[half]);
      each(l[half]);
      each(average[0][half]);
      each(average[1][half]);
    }
    out.for_each([&](float& x, int, int) { each(x); });
  }
  static constexpr int kHeld = 8 + Tile<D>::kBlocks * 4;

  SMATTN_DEVICE void merge(Softmax& other) {
    float mine[2], theirs[2];
    SMATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float top = fmaxf(m[half], other.m[half]);
      m[half] = rescale_to(half, top, mine[half]);
      other.m[half] = other.rescale_to(half, top, theirs[half]);
      l[half] = l[half] * mine[half] + other.l[half] * theirs[half];
      average[0][half] += other.average[0][half];
      average[1][half] += other.average[1][half];
    }
    out.for_each_with(other.out, [&](float& x, float& y, int half, int) { x = x * mine[half] + y * theirs[half]; });
  }
};

// The row's factor of O and its lse, from its finished sums, (3) and (4). A dead row, l = 0, is 0 with lse -inf; a row with a score of +inf
// is NaN with lse +inf.
SMATTN_DEVICE float finish_row(float m, float l, float& lse) {
  lse = l == 0.0f ? -infinity() : (m + log2_exact(l)) * kLn2;
  if (l == 0.0f) return 0.0f;
  return m == infinity() ? not_a_number() : 1.0f / l;
}

template <class T>
SMATTN_DEVICE void store_row(const ForwardArgs& args, int64_t row, float m, float lse, float factor, const float (&average)[2]) {
  if (args.lse != nullptr) args.lse[row] = lse;
  if constexpr (sizeof(T) == 4) {
    if (args.normalizer != nullptr) {
      args.normalizer[2 * row] = factor == 0.0f ? infinity() : m;  // so that what is subtracted from a dead row's scores leaves no P
      args.normalizer[2 * row + 1] = factor;
    }
  }
  if (args.mbar != nullptr) args.mbar[row] = average[0] * factor;
  if (args.eta != nullptr) args.eta[row] = average[1] * factor;
}

template <class T, int ROWS, int D>
SMATTN_DEVICE void store_finished(const ForwardArgs& args, Softmax<D>& softmax, SharedTile<T, ROWS, D> shared, int row, int64_t first_row,
                                  int rows) {
  const int depth = static_cast<int>(args.call.scores.size.Dv);
  float factor[2];
  SMATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float lse;
    factor[half] = finish_row(softmax.m[half], softmax.l[half], lse);
    const float average[2] = {softmax.average[0][half], softmax.average[1][half]};
    if (lane_index() % 4 == 0 && row_of(half) < rows)
      store_row<T>(args, first_row + row_of(half), softmax.m[half], lse, factor[half], average);
    factor[half] *= args.call.keep_scale;
  }
  if (args.out == nullptr) return;
  softmax.out.scale_rows(factor);
  store_tile(softmax.out, shared, row, static_cast<T*>(args.out) + first_row * depth, rows, depth);
  if constexpr (sizeof(T) == 2) {
    if (args.remainder == nullptr) return;
    store_tile<AsRemainder>(softmax.out, shared, row, static_cast<T*>(args.remainder) + first_row * depth, rows, depth);
  }
}

template <int D>
SMATTN_DEVICE void store_partial(const ForwardArgs& args, Softmax<D>& softmax, int64_t first_row, int rows) {
  const int depth = static_cast<int>(args.call.scores.size.Dv);
  SMATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const PartialRow row{softmax.m[half], softmax.l[half], {softmax.average[0][half], softmax.average[1][half]}};
    if (lane_index() % 4 == 0 && row_of(half) < rows) args.partial_rows[first_row + row_of(half)] = row;
  }
  if (args.out != nullptr) store_floats(softmax.out, args.partial_out + first_row * depth, rows, depth);
}

// Warps that hold the same rows, over different keys, into the first of them.
template <int WARPS, int D>
SMATTN_DEVICE void merge_warps(Softmax<D>& softmax, float* shared) {
  using Held = Softmax<D>;
  int i = 0;
  softmax.for_each([&](float& x) { shared[(warp_index() * Held::kHeld + i++) * kWarp + lane_index()] = x; });
  sync_block();
  if (warp_index() > 0) return;
  for (int warp = 1; warp < WARPS; ++warp) {
    Held other;
    i = 0;
    other.for_each([&](float& x) { x = shared[(warp * Held::kHeld + i++) * kWarp + lane_index()]; });
    softmax.merge(other);
  }
}

// One tile of keys: scores, softmax, product with V.
template <class Math, int D, int KEYS, int ROWS, int TILE>
SMATTN_DEVICE void attend(const ForwardArgs& args, Softmax<D>& softmax, Head at, const Place<KEYS, false>& place,
                          SharedTile<typename Math::Element, ROWS, D> q, SharedTile<typename Math::Element, TILE, D> k,
                          SharedTile<typename Math::Element, TILE, D> v) {
  const Scores& scores = args.call.scores;
  Tile<KEYS> s, m;
  if (scores.mask.data != nullptr) load_mask(m, scores, at, place);
  s.fill(0.0f);
  Math::multiply_rows(s, q, k);
  finish_scores(s, m, scores, alpha_of(scores, at.h), place);
  softmax.template step<typename Math::Element>(s);
  if (args.mbar != nullptr) softmax.add_average(0, s, m);
  if (args.eta != nullptr) {
    load_elements(m, args.dmap, {at.b, 0}, place);
    softmax.add_average(1, s, m);
  }
  if (args.out == nullptr) return;
  softmax.template add_weights<typename Math::Element>(s);
  drop(s, args.call, at, 1.0f, place);
  Math::multiply_tile(softmax.out, s, v);
}

template <class Math, int D, bool FEW>
SMATTN_DEVICE void forward_block(const ForwardArgs& args, std::byte* shared) {
  using T = typename Math::Element;
  using Shape = ForwardShape<Math, D>;
  constexpr int kQueries = Shape::queries(FEW), kTile = Shape::kKeys, kKeys = FEW ? kTile / Shape::kWarps : kTile;
  constexpr int kThreads = Shape::kWarps * kWarp;
  const Scores& scores = args.call.scores;
  const Sizes& size = scores.size;

  const QueryWork work(size, kQueries, tiles_of(static_cast<int>(size.Nq), kQueries), args.splits, args.split_keys);
  const SharedTile<T, kQueries, D> q{reinterpret_cast<T*>(shared)};
  const auto stage = [&](int tile, int which) {  // K and V of two tiles, after q
    return SharedTile<T, kTile, D>{q.data + (kQueries + (tile % 2 * 2 + which) * kTile) * D};
  };
  const LiveKeys keys{scores, work.at.b, work.last_key};
  const auto load = [&](int tile) {
    const int first = work.first_key + tile * kTile;
    const auto k = stage(tile, 0), v = stage(tile, 1);
    const uint32_t live = k.template live_rows<kThreads>(first, keys);
    k.template load<kThreads>(key_rows<T>(args.call, work.at.b, work.group), first, live);
    if (args.out != nullptr) v.template load<kThreads>(value_rows<T>(args.call, work.at.b, work.group), first, live);
  };

  const uint32_t live_queries = q.template live_rows<kThreads>(work.first_query, Before{static_cast<int>(size.Nq)});
  q.template load<kThreads>(query_rows<T>(args.call, work.at), work.first_query, live_queries);
  Softmax<D> softmax;
  softmax.out.fill(0.0f);
  const int row = FEW ? 0 : warp_index() * 16, key_row = FEW ? warp_index() * kKeys : 0;
  pipeline(tiles_of(work.last_key - work.first_key, kTile), load, [&](int tile) {
    const int first_key = work.first_key + tile * kTile + key_row;
    const Place<kKeys, false> place(keys, work.first_query + row, first_key);
    attend<Math, D>(args, softmax, work.at, place, q.from_row(row), stage(tile, 0).from_row(key_row), stage(tile, 1).from_row(key_row));
  });
  if (sizeof(T) == 4 || args.out != nullptr) softmax.template settle<T>();
  if constexpr (FEW) {
    merge_warps<Shape::kWarps>(softmax, reinterpret_cast<float*>(shared));
    if (warp_index() > 0) return;
  }
  SMATTN_UNROLL
  for (int half = 0; half < 2; ++half)
    if (softmax.m[half] < kLowestScore && softmax.l[half] == softmax.l[half])  // a maximum does not see NaN, but the sum does
      softmax.m[half] = -infinity(), softmax.l[half] = 0.0f;
  const int64_t first_row = work.at.row(size) * size.Nq + work.first_query + row;
  const int rest = static_cast<int>(size.Nq) - work.first_query - row;
  if (args.splits > 1) {
    store_partial(args, softmax, work.split * size.B * size.H * size.Nq + first_row, rest);
  } else {
    store_finished(args, softmax, q, row, first_row, rest);
  }
}

}  // namespace smattn::cuda
