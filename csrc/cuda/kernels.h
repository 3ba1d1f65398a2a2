// The kernels of one way to multiply and one head size, as functions that launch them.
#pragma once

#include "args.h"
#include "plan.h"

namespace smattn::cuda {

// A block's tile; few_queries is 0 where no variant parts a block's keys among its warps.
struct Tiling {
  int queries, few_queries, keys;
  bool few(int64_t Nq) const { return Nq <= few_queries; }
  int64_t query_blocks(int64_t Nq) const { return (Nq + (few(Nq) ? few_queries : queries) - 1) / (few(Nq) ? few_queries : queries); }
};

struct Passes {
  Tiling forward_tiling, queries_tiling;
  int tile_span;      // most queries of a block of backward_keys when it sums a tile over heads
  bool normalized;    // the passes of backward read NormalizerState
  void (*forward)(const ForwardArgs& args, const Context& context);
  void (*forward_merge)(const ForwardArgs& args, const Context& context);
  void (*backward_keys)(const KeysArgs& args, const Context& context);
  void (*backward_queries)(const QueriesArgs& args, const Context& context);
};

template <class T>
struct HalfMath;
struct Tf32Math;
struct FloatMath;

// Instantiated in instances/.
template <class Math, int D>
Passes passes();

void backward_rows(const RowsArgs& args, const Context& context);
void sum_many(const SumArgs& args, const Context& context);
void sum_few(const SumArgs& args, const Context& context);

}  // namespace smattn::cuda
