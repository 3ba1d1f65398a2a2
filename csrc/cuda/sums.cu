#include "sums.h"

#include "launch.h"
#include "passes.h"

namespace smattn::cuda {
namespace {

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

void sum_many(const SumArgs& args, const Context& context) {
  launch<SumManyKernel>((args.outer * args.middle * args.inner + kSumThreads - 1) / kSumThreads, 0, args, context);
}

void sum_few(const SumArgs& args, const Context& context) {
  constexpr int64_t kWarps = kSumThreads / kWarp;
  launch<SumFewKernel>((args.outer * args.middle + kWarps - 1) / kWarps, 0, args, context);
}

}  // namespace smattn::cuda
