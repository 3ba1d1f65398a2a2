// The kernels without torch and without Python, for the sanitizers and for machines that are only emulated: odd problems through every
// instruction set this machine has, on one thread and on several, against naive loops in long double.
//
//     smattn_driver [first [last]]    problems first..last - 1; each prints alike wherever it is run
//
// And a small batch whose heads share a mask: how many workers it may have, and that those of backward wait for each other.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "inputs.h"
#include "oracle.h"
#include "problem.h"
#include "run.h"

namespace smattn::driver {
namespace {

// As small pieces as allowed, to whoever comes first.
template <int Threads>
void share_out(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t piece = std::max<int64_t>(Threads == 1 ? items : grain, 1);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    // Relaxed: the counter must not order what two pieces do, or ThreadSanitizer would miss their races.
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < items;)
      body(begin, std::min(items, begin + piece), context);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < std::min<int64_t>(Threads, (items + piece - 1) / piece); ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

template <int Threads>
constexpr ParallelFor on = {Threads, share_out<Threads>};

struct Tally {
  int64_t passed = 0, failed = 0;
  std::map<std::string, double> share;  // by output, the worst of all problems
};

bool report(const char* set, const char* threads, const std::string& what) {
  std::printf("  FAILED on %s, %s: %s\n", set, threads, what.c_str());
  return false;
}

bool check(const std::vector<Output>& outputs, const char* set, const char* threads, Tally& tally) {
  bool good = true;
  for (const Output& output : outputs) {
    const Comparison worst = compare(output);
    double& share = tally.share[output.name];
    share = std::max(share, worst.share);
    if (worst.share > 1.0) good = report(set, threads, worst.where + ", error / allowed " + std::to_string(worst.share));
    if (!output.array.front_intact()) good = report(set, threads, output.name + ": written before its first byte");
  }
  return good;
}

void run_problem(const Problem& problem, bool many, Tally& tally) {
  std::printf("%s\n", describe(problem).c_str());
  std::fflush(stdout);  // the line that a crash leaves behind
  const Inputs inputs = make_inputs(problem);
  const Answers answers = solve(problem, inputs);
  const char* threads = many ? "64 threads" : "3 threads";
  for (const cpu::Kernels* kernels : cpu::available()) {
    const std::vector<Output> alone = run_kernels(*kernels, problem, inputs, answers, on<1>);
    const std::vector<Output> shared = run_kernels(*kernels, problem, inputs, answers, many ? on<64> : on<3>);
    bool good = check(alone, kernels->name, "1 thread", tally);
    good = check(shared, kernels->name, threads, tally) && good;
    for (size_t k = 0; k < alone.size(); ++k) {
      if (!alone[k].array.same_bytes(shared[k].array)) good = report(kernels->name, threads, alone[k].name + ": other bits than on 1");
    }
    ++(good ? tally.passed : tally.failed);
  }
}

// A problem of one batch, which backward cuts into runs (csrc/cpu/runs.h).
Problem of_one_batch(int64_t heads, int64_t queries, int64_t keys, int64_t size, DType dtype) {
  Problem problem;
  problem.size = {.B = 1, .H = heads, .Hkv = heads, .Nq = queries, .Nk = keys, .D = size, .Dv = size};
  problem.dtype = problem.mask_dtype = dtype;
  problem.mask_size[2] = queries;
  problem.mask.expanded = {true, true, false, false};
  problem.has_dlse = false;
  return problem;
}

// The workload self1k.
bool uses_all_threads(const cpu::Kernels& kernels, DType dtype) {
  const Problem problem = of_one_batch(8, 1024, 1024, 64, dtype);
  const Workers most = workers_of(kernels, problem);
  std::printf("self1k on %s, %s, %lld threads: %lld are used forward, %lld backward\n", kernels.name, name_of(dtype),
              static_cast<long long>(Workers::kThreads), static_cast<long long>(most.forward), static_cast<long long>(most.backward));
  return std::min(most.forward, most.backward) == Workers::kThreads || report(kernels.name, name_of(dtype), "self1k leaves threads idle");
}

}  // namespace
}  // namespace smattn::driver

int main(int argc, char** argv) {
  using namespace smattn::driver;
  const int64_t first = argc > 1 ? std::atoll(argv[1]) : 0, last = argc > 2 ? std::atoll(argv[2]) : argc > 1 ? first + 1 : 200;
  Tally tally;
  for (int64_t index = first; index < last; ++index) run_problem(problem_at(index), index % 2 == 1, tally);
  run_problem(of_one_batch(96, 130, 146, 32, smattn::DType::kBFloat16), true, tally);  // two rows of runs take turns in one slot
  for (const smattn::cpu::Kernels* kernels : smattn::cpu::available()) {
    for (const smattn::DType dtype : {smattn::DType::kFloat32, smattn::DType::kBFloat16, smattn::DType::kFloat16}) {
      ++(uses_all_threads(*kernels, dtype) ? tally.passed : tally.failed);
    }
  }
  std::printf("worst error / allowed:\n");
  for (const auto& [name, share] : tally.share) std::printf("  %-16s %.3f\n", name.c_str(), share);
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(tally.passed), static_cast<long long>(tally.failed));
  return tally.failed != 0 || tally.passed == 0 ? 1 : 0;
}
