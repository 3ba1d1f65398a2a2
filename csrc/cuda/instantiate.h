// passes<Math, D>(), for the files in instances/.
#pragma once

#include <type_traits>

#include "backward_keys.h"
#include "backward_queries.h"
#include "forward_merge.h"
#include "kernels.h"
#include "launch.h"
#include "product.h"

namespace smattn::cuda {

template <class Math, int D, bool FEW>
struct ForwardKernel {
  using Args = ForwardArgs;
  static constexpr const char* kName = "forward";
  static constexpr int kThreads = ForwardShape<Math, D>::kWarps * kWarp;
  static SMATTN_DEVICE void run(const Args& args, std::byte* shared) { forward_block<Math, D, FEW>(args, shared); }
};

template <class T>
struct ForwardMergeKernel {
  using Args = ForwardArgs;
  static constexpr const char* kName = "forward_merge";
  static constexpr int kThreads = kMergeThreads;
  static SMATTN_DEVICE void run(const Args& args, std::byte*) { forward_merge_block<T>(args); }
};

template <class Math, int D, bool DKEY, bool DVALUE>
struct BackwardKeysKernel {
  using Args = KeysArgs;
  static constexpr const char* kName = "backward_keys";
  static constexpr int kThreads = KeysShape<Math, D>::kWarps * kWarp;
  static SMATTN_DEVICE void run(const Args& args, std::byte* shared) { backward_keys_block<Math, D, DKEY, DVALUE>(args, shared); }
};

template <class Math, int D, bool FEW, bool DQUERY, bool SUMS>
struct BackwardQueriesKernel {
  using Args = QueriesArgs;
  static constexpr const char* kName = "backward_queries";
  static constexpr int kThreads = QueriesShape<Math, D>::kWarps * kWarp;
  static SMATTN_DEVICE void run(const Args& args, std::byte* shared) { backward_queries_block<Math, D, FEW, DQUERY, SUMS>(args, shared); }
};

// A kernel, or where there is one its variant for few queries.
template <class Kernel, class KernelOfFew, class Shape, class Args>
void launch_by_queries(const Args& args, const Tiling& tiling, const Context& context) {
  const Sizes& size = args.call.scores.size;
  const int64_t blocks = size.B * size.H * tiling.query_blocks(size.Nq) * args.splits;
  if constexpr (Shape::kHasFew)
    if (tiling.few(size.Nq)) return launch<KernelOfFew>(blocks, Shape::shared_bytes(true), args, context);
  launch<Kernel>(blocks, Shape::shared_bytes(false), args, context);
}

template <class Shape>
constexpr Tiling tiling_of(int keys) {
  return {Shape::queries(false), Shape::kHasFew ? Shape::queries(true) : 0, keys};
}

// What a block may have on compute capability 8.6, 8.9 and 12.0.
constexpr size_t kMostSharedBytes = 99 * 1024;

template <class Math, int D>
struct PassesOf {
  static_assert(ForwardShape<Math, D>::shared_bytes(false) <= kMostSharedBytes);
  static_assert(QueriesShape<Math, D>::shared_bytes(false) <= kMostSharedBytes);
  static_assert(KeysShape<Math, D>::shared_bytes(true) <= kMostSharedBytes);
  using T = typename Math::Element;
  static constexpr Tiling kForward = tiling_of<ForwardShape<Math, D>>(ForwardShape<Math, D>::kKeys);
  static constexpr Tiling kQueries = tiling_of<QueriesShape<Math, D>>(QueriesShape<Math, D>::keys(true));

  static void forward(const ForwardArgs& args, const Context& context) {
    launch_by_queries<ForwardKernel<Math, D, false>, ForwardKernel<Math, D, true>, ForwardShape<Math, D>>(args, kForward, context);
  }

  static void forward_merge(const ForwardArgs& args, const Context& context) {
    const Sizes& size = args.call.scores.size;
    launch<ForwardMergeKernel<T>>(blocks_of(size.B * size.H * size.Nq, kMergeThreads / kWarp), 0, args, context);
  }

  static void backward_queries(const QueriesArgs& args, const Context& context) {
    if constexpr (D <= 128) {
      queries<true, true>(args, context);
    } else {  // what is summed beside an accumulator of this width does not fit the registers: one after the other
      QueriesArgs one = args;
      one.dalpha = nullptr;
      if (args.dquery != nullptr) queries<true, false>(one, context);
      one = args;
      one.dquery = nullptr;
      if (args.dalpha != nullptr || args.delta != nullptr) queries<false, true>(one, context);
    }
  }

  template <bool DQUERY, bool SUMS>
  static void queries(const QueriesArgs& args, const Context& context) {
    using Kernel = BackwardQueriesKernel<Math, D, false, DQUERY, SUMS>;
    launch_by_queries<Kernel, BackwardQueriesKernel<Math, D, true, DQUERY, SUMS>, QueriesShape<Math, D>>(args, kQueries, context);
  }

  static void backward_keys(const KeysArgs& args, const Context& context) {
    if (args.dkey == nullptr && args.dvalue == nullptr) return keys<false, false>(args, context);
    if constexpr (D <= 128) {
      keys<true, true>(args, context);
    } else {  // two accumulators of this width do not fit the registers: dK and dV one after the other
      KeysArgs rest = args;
      if (args.dvalue != nullptr) {
        rest.dkey = nullptr;
        keys<false, true>(rest, context);
        rest = args;
        rest.dvalue = nullptr;
        rest.tile_sum = TileSum::kNone;
        rest.row_out = nullptr;
      }
      if (args.dkey != nullptr) keys<true, false>(rest, context);
    }
  }

  template <bool DKEY, bool DVALUE>
  static void keys(const KeysArgs& args, const Context& context) {
    using Shape = KeysShape<Math, D>;
    const Sizes& size = args.call.scores.size;
    const MaskBatch& batch = args.call.scores.mask_batch;
    const int64_t tiles = blocks_of(size.Nk, Shape::kKeys) * blocks_of(size.Nq, args.span);
    const int64_t blocks = tiles * (size.H / args.heads) * batch.masks() * blocks_of(batch.sharers(size.B), args.batches);
    launch<BackwardKeysKernel<Math, D, DKEY, DVALUE>>(blocks, Shape::shared_bytes(args.tile_sum != TileSum::kNone), args, context);
  }
};

template <class Math, int D>
Passes passes() {
  using P = PassesOf<Math, D>;
  using Keys = KeysShape<Math, D>;
  constexpr bool kNormalized = std::is_same_v<typename Math::RowState, NormalizerState>;
  return {P::kForward, P::kQueries, Keys::kTileSpan, kNormalized, P::forward, P::forward_merge, P::backward_keys, P::backward_queries};
}

}  // namespace smattn::cuda
