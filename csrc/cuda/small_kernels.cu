// The kernels that neither multiply nor depend on a call's dtype.
#include "backward_rows.h"
#include "kernels.h"
#include "launch.h"
#include "sums.h"

namespace smattn::cuda {
namespace {

struct BackwardRowsKernel {
  using Args = RowsArgs;
  static constexpr const char* kName = "backward_rows";
  static constexpr int kThreads = kRowsThreads;
  static SMATTN_DEVICE void run(const Args& args, std::byte*) { backward_rows_block(args); }
};

struct SumManyKernel {
  using Args = SumArgs;
  static constexpr const char* kName = "sum_many";
  static constexpr int kThreads = kSumThreads;
  static SMATTN_DEVICE void run(const Args& args, std::byte*) { sum_many_block(args); }
};

struct SumFewKernel {
  using Args = SumArgs;
  static constexpr const char* kName = "sum_few";
  static constexpr int kThreads = kSumThreads;
  static SMATTN_DEVICE void run(const Args& args, std::byte*) { sum_few_block(args); }
};

}  // namespace

void backward_rows(const RowsArgs& args, const Context& context) {
  const Sizes& size = args.call.scores.size;
  launch<BackwardRowsKernel>(blocks_of(size.B * size.H * size.Nq, kRowsThreads / kWarp), 0, args, context);
}

void sum_many(const SumArgs& args, const Context& context) {
  launch<SumManyKernel>(blocks_of(args.outer * args.middle * args.inner, kSumThreads), 0, args, context);
}

void sum_few(const SumArgs& args, const Context& context) {
  launch<SumFewKernel>(blocks_of(args.outer * args.middle, kSumThreads / kWarp), 0, args, context);
}

}  // namespace smattn::cuda
