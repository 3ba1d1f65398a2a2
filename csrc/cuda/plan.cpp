#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "../philox.h"
#include "plan_parts.h"

namespace smattn::cuda {
namespace {

constexpr int64_t kEnoughBlocks = 512;           // about two a multiprocessor on the largest GPUs
constexpr int64_t kShortestRange = 256;          // keys
constexpr int64_t kMostRows = int64_t{1} << 30;  // an int counts queries or keys inside a kernel, everything else is 64 bits wide

template <class Math>
Passes passes_of_depth(int64_t depth) {
  if (depth <= 32) return passes<Math, 32>();
  if (depth <= 64) return passes<Math, 64>();
  if (depth <= 128) return passes<Math, 128>();
  return passes<Math, 256>();
}

Passes passes_for(DType dtype, int64_t depth, bool allow_tf32) {
  if (depth > kLargestHead) throw std::runtime_error("CUDA kernels: head size above 256");
  switch (dtype) {
    case DType::kFloat16: return passes_of_depth<HalfMath<Half>>(depth);
    case DType::kBFloat16: return passes_of_depth<HalfMath<BFloat16>>(depth);
    case DType::kFloat32: return allow_tf32 ? passes_of_depth<Tf32Math>(depth) : passes_of_depth<FloatMath>(depth);
    case DType::kFloat64: break;
  }
  throw std::runtime_error("CUDA kernels: no float64");
}

// Rows can be copied 16 bytes at a time.
bool aligned(const Tensor4& x) {
  if (x.stride[3] != 1 || reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return false;
  return std::all_of(x.stride, x.stride + 3, [&](int64_t stride) { return stride * bytes_of(x.dtype) % 16 == 0; });
}

Call call_of(const Scores& scores, const Tensor4& value, double dropout_p, const Context& context) {
  if (std::max(scores.size.Nq, scores.size.Nk) > kMostRows) throw std::runtime_error("CUDA kernels: more than 2^30 queries or keys");
  return {.scores = scores,
          .value = value,
          .query_aligned = aligned(scores.query),
          .key_aligned = aligned(scores.key),
          .value_aligned = aligned(value),
          .seed = context.seed,
          .drop_below = dropout_p > 0.0 ? dropout_threshold(dropout_p) : 0,
          .keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p))};
}

// What the passes of backward read of the query rows is to be made in scratch; of this alone, with a delta of 0.
RowsArgs rows_for(const Passes& passes, const Call& call, const void* lse, const void* normalizer, const Context& context) {
  const Sizes& size = call.scores.size;
  const int64_t count = size.B * size.H * size.Nq;
  void* rows = passes.normalized ? static_cast<void*>(allocate<NormalizerState>(count, context)) : allocate<LseState>(count, context);
  return {.call = call,
          .lse = static_cast<const float*>(lse),
          .normalizer = static_cast<const float*>(normalizer),
          .rows = rows,
          .normalized = passes.normalized};
}

struct Ranges {
  int64_t splits, split_keys;
};

// Into how many ranges the keys are parted, so that few queries keep a GPU busy. By the shape alone: results repeat on every device.
Ranges ranges_of(const Sizes& size, const Tiling& tiling, int64_t row_bytes) {
  const int64_t rows = size.B * size.H, blocks = rows * tiling.query_blocks(size.Nq);
  const int64_t most = std::max<int64_t>(1, std::min(size.Nk / kShortestRange, kMostPartialBytes / (rows * size.Nq * row_bytes)));
  const int64_t wanted = std::clamp<int64_t>((kEnoughBlocks + blocks - 1) / blocks, 1, most);
  const int64_t tiles = (size.Nk + tiling.keys - 1) / tiling.keys, tiles_each = (tiles + wanted - 1) / wanted;
  return {(tiles + tiles_each - 1) / tiles_each, tiles_each * tiling.keys};
}

void run_forward(ForwardArgs args, const Passes& passes, const Context& context) {
  const Sizes& size = args.call.scores.size;
  const int64_t row_bytes = (args.out != nullptr ? size.Dv * 4 : 0) + static_cast<int64_t>(sizeof(PartialRow));
  const Ranges ranges = ranges_of(size, passes.forward_tiling, row_bytes);
  args.splits = ranges.splits;
  args.split_keys = ranges.split_keys;
  if (args.splits > 1) {
    const int64_t rows = args.splits * size.B * size.H * size.Nq;
    args.partial_rows = allocate<PartialRow>(rows, context);
    if (args.out != nullptr) args.partial_out = allocate<float>(rows * size.Dv, context);
  }
  passes.forward(args, context);
  if (args.splits > 1) passes.forward_merge(args, context);
}

// Sums of P*dP (B, H, Nq), from rows whose delta is 0.
void run_delta(QueriesArgs args, float* sums, const Passes& passes, const Context& context) {
  const Sizes& size = args.call.scores.size;
  const int64_t count = size.B * size.H * size.Nq;
  const Ranges ranges = ranges_of(size, passes.queries_tiling, 4);
  args.splits = ranges.splits;
  args.split_keys = ranges.split_keys;
  args.delta = args.splits > 1 ? allocate<float>(args.splits * count, context) : sums;
  passes.backward_queries(args, context);
  if (args.splits > 1) sum_many({.from = args.delta, .to = sums, .inner = count, .second = args.splits, .stride_second = count}, context);
}

// dQ and dalpha.
void run_queries(QueriesArgs args, const Wanted& wanted, const Passes& passes, const Context& context) {
  const Scores& scores = args.call.scores;
  const Sizes& size = scores.size;
  if (wanted.dquery == nullptr && wanted.dalpha == nullptr) return;
  const Ranges ranges = ranges_of(size, passes.queries_tiling, size.D * 4);
  const int64_t rows = size.B * size.H, partials = passes.queries_tiling.query_blocks(size.Nq) * ranges.splits;
  args.splits = ranges.splits;
  args.split_keys = ranges.split_keys;
  args.dquery = wanted.dquery;
  if (wanted.dalpha != nullptr) args.dalpha = allocate<float>(rows * partials, context);
  const int64_t count = rows * size.Nq * size.D;
  if (wanted.dquery != nullptr && args.splits > 1) args.partial_dquery = allocate<float>(args.splits * count, context);
  passes.backward_queries(args, context);
  if (args.partial_dquery != nullptr)
    sum_many({.from = args.partial_dquery,
              .to = wanted.dquery,
              .dtype = scores.dtype,
              .inner = count,
              .second = args.splits,
              .stride_second = count},
             context);
  if (wanted.dalpha != nullptr)
    sum_few({.from = args.dalpha,
             .to = wanted.dalpha,
             .dtype = DType::kFloat32,
             .outer = 1,
             .middle = size.H,
             .inner = 1,
             .stride_outer = 0,
             .stride_middle = partials,
             .first = size.B,
             .second = partials,
             .stride_first = size.H * partials,
             .stride_second = 1},
            context);
}

}  // namespace

void forward(const ForwardParams& params, const Context& context) {
  const Scores& scores = params.scores;
  run_forward({.call = call_of(scores, params.value, params.dropout.p, context),
               .out = params.out,
               .remainder = params.remainder,
               .lse = static_cast<float*>(params.lse),
               .mbar = static_cast<float*>(params.mbar),
               .normalizer = static_cast<float*>(params.normalizer)},
              passes_for(scores.dtype, std::max(scores.size.D, scores.size.Dv), context.allow_tf32), context);
}

void backward(const BackwardParams& params, const Context& context) {
  const Scores& scores = params.scores;
  const Sizes& size = scores.size;
  const Passes passes = passes_for(scores.dtype, std::max(size.D, size.Dv), context.allow_tf32);
  const Call call = call_of(scores, params.value, params.dropout.p, context);
  const Wanted wanted{params.dquery, params.dkey, params.dvalue, params.dmask, params.dalpha};
  const int64_t count = size.B * size.H * size.Nq;
  RowsArgs rows = rows_for(passes, call, params.lse, params.normalizer, context);
  const auto* dlse = static_cast<const float*>(params.dlse);
  const QueriesArgs queries{.call = call,
                            .dout = params.dout,
                            .dout_aligned = aligned(params.dout),
                            .rows = rows.rows,
                            .mbar = static_cast<const float*>(params.mbar),
                            .dlse = dlse};
  if (params.out != nullptr) {
    rows.dout = params.dout;
    rows.out = params.out;
    rows.remainder = params.remainder;
  } else if (wanted.dquery != nullptr || wanted.dkey != nullptr || wanted.dmask != nullptr || wanted.dalpha != nullptr) {
    auto* sums = allocate<float>(count, context);
    backward_rows(rows, context);
    run_delta(queries, sums, passes, context);
    rows.sums = sums;
  }
  rows.dlse = dlse;
  backward_rows(rows, context);
  run_keys({.call = call, .dout = params.dout, .dout_aligned = aligned(params.dout), .rows = rows.rows}, wanted, passes, context);
  run_queries(queries, wanted, passes, context);
}

void attention_map(const MapParams& params, const Context& context) {
  const Scores& scores = params.scores;
  const Passes passes = passes_for(scores.dtype, scores.size.D, context.allow_tf32);
  const Call call = call_of(scores, {}, 0.0, context);
  const RowsArgs rows = rows_for(passes, call, params.lse, params.normalizer, context);
  const auto* weights = static_cast<const float*>(params.head_weights);
  run_forward({.call = call, .lse = static_cast<float*>(params.lse), .normalizer = static_cast<float*>(params.normalizer)}, passes,
              context);
  backward_rows(rows, context);
  passes.backward_keys({.call = call,
                        .head_weights = weights,
                        .rows = rows.rows,
                        .tile_sum = TileSum::kMap,
                        .tile_out = params.map,
                        .tile_dtype = DType::kFloat32,
                        .heads = scores.size.H,
                        .batches = 1,
                        .span = passes.tile_span},
                       context);
}

void attention_map_backward(const MapBackwardParams& params, const Context& context) {
  const Scores& scores = params.scores;
  const Sizes& size = scores.size;
  const int64_t count = size.B * size.H * size.Nq;
  const Passes passes = passes_for(scores.dtype, size.D, context.allow_tf32);
  const Call call = call_of(scores, {}, 0.0, context);
  const auto* weights = static_cast<const float*>(params.head_weights);
  RowsArgs rows = rows_for(passes, call, params.lse, params.normalizer, context);
  auto* eta = allocate<float>(count, context);
  auto* mbar = params.dalpha != nullptr ? allocate<float>(count, context) : nullptr;
  run_forward({.call = call, .dmap = params.dmap, .mbar = mbar, .eta = eta}, passes, context);
  rows.sums = eta;
  rows.head_weights = weights;
  backward_rows(rows, context);
  const Wanted wanted{params.dquery, params.dkey, nullptr, params.dmask, params.dalpha};
  run_keys({.call = call, .dmap = params.dmap, .head_weights = weights, .rows = rows.rows}, wanted, passes, context);
  run_queries({.call = call, .dmap = params.dmap, .head_weights = weights, .rows = rows.rows, .mbar = mbar}, wanted, passes, context);
  if (params.dhead_weights != nullptr)
    sum_few({.from = eta,
             .to = params.dhead_weights,
             .dtype = DType::kFloat32,
             .outer = 1,
             .middle = size.H,
             .inner = 1,
             .stride_outer = 0,
             .stride_middle = size.Nq,
             .first = size.B,
             .second = size.Nq,
             .stride_first = size.H * size.Nq,
             .stride_second = 1},
            context);
}

}  // namespace smattn::cuda
