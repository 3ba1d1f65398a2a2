#include <algorithm>

#include "plan_parts.h"

namespace smattn::cuda {
namespace {

// dM of a mask without a query axis, in rows that the passes over keys sum over queries: straight into dM where each of its rows is one
// block's, else into scratch, whose rows are then summed over the axes that mask has not.
struct RowSums {
  const Scores& scores;
  int64_t masks, batches, shares, rows;  // masks of the batch; of one mask: batches to a block, blocks of them, rows of each
  bool has_head;
  float* scratch;

  RowSums(const Scores& scores, const Context& context) : scores(scores) {
    const Sizes& size = scores.size;
    const int64_t sharers = scores.mask_batch.sharers(size.B);
    masks = scores.mask_batch.masks();
    has_head = scores.mask_size[1] > 1 || size.H == 1;
    rows = has_head ? size.H : size.Hkv;
    const int64_t most = std::max<int64_t>(1, kMostPartialBytes / (masks * rows * size.Nk * 4));
    batches = (sharers + most - 1) / most;
    shares = (sharers + batches - 1) / batches;
    const bool adds_up = shares == 1 && scores.mask.dtype == DType::kFloat32 && !scores.mask_is_logits;  // a block, to its own rows
    const bool is_direct = has_head && (sharers == 1 || adds_up);
    scratch = is_direct ? nullptr : allocate<float>(masks * shares * rows * size.Nk, context);
  }
  void ask(KeysArgs& args, void* dmask) const {
    args.row_out = scratch != nullptr ? scratch : dmask;
    args.row_dtype = scratch != nullptr ? DType::kFloat32 : scores.mask.dtype;
    args.row_is_final = scratch == nullptr;
    args.row_per_head = has_head;
    args.batches = batches;
  }
  void finish(void* dmask, const Context& context) const {
    const int64_t Nk = scores.size.Nk;
    if (scratch != nullptr)
      sum_many({.from = scratch,
                .to = dmask,
                .dtype = scores.mask.dtype,
                .outer = masks,
                .middle = has_head ? rows : 1,
                .inner = Nk,
                .stride_outer = shares * rows * Nk,
                .stride_middle = Nk,
                .first = shares,
                .second = has_head ? 1 : rows,
                .stride_first = rows * Nk,
                .stride_second = Nk,
                .logits = scores.mask_is_logits ? scores.mask : Tensor4{},
                .logits_batch = scores.mask_batch},
               context);
  }
};

}  // namespace

void run_keys(KeysArgs args, const Wanted& wanted, const Passes& passes, const Context& context) {
  const Scores& scores = args.call.scores;
  const Sizes& size = scores.size;
  const int64_t sharers = scores.mask_batch.sharers(size.B);
  const bool shared_batch = sharers > 1, per_head = size.H > 1 && scores.mask_size[1] > 1;
  const bool key_only = wanted.dmask != nullptr && size.Nq > 1 && scores.mask_size[2] == 1;
  const bool tile = wanted.dmask != nullptr && !key_only, wide = wanted.dkey != nullptr || wanted.dvalue != nullptr;
  const bool fused = tile && wide && size.Nq <= passes.tile_span && !(shared_batch && per_head);

  KeysArgs tiled = args;
  tiled.tile_sum = TileSum::kMaskGradient;
  tiled.tile_out = wanted.dmask;
  tiled.tile_dtype = scores.mask.dtype;
  tiled.tile_per_head = per_head;
  tiled.heads = per_head ? 1 : size.H;
  tiled.batches = sharers;
  tiled.span = passes.tile_span;

  args.dkey = wanted.dkey;
  args.dvalue = wanted.dvalue;
  args.heads = size.H / size.Hkv;
  args.batches = 1;
  args.span = size.Nq;
  if (fused) {
    tiled.dkey = wanted.dkey;
    tiled.dvalue = wanted.dvalue;
    tiled.heads = per_head ? size.H / size.Hkv : size.H;
    return passes.backward_keys(tiled, context);
  }
  if (key_only) {
    const RowSums sums(scores, context);
    sums.ask(args, wanted.dmask);
    passes.backward_keys(args, context);
    sums.finish(wanted.dmask, context);
  } else if (wide) {
    passes.backward_keys(args, context);
  }
  if (tile) passes.backward_keys(tiled, context);
}

}  // namespace smattn::cuda
