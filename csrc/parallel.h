// How a kernel runs in parallel without knowing whose threads they are: the binding hands in torch's pool, a test driver its own.
#pragma once

#include <cstdint>

namespace smattn {

// run: runs body(begin, end, context) over disjoint ranges that cover [0, items), each of at least `grain` items but the last,
// possibly at the same time, on so many threads; returns when all are done. A body must not throw.
struct ParallelFor {
  int64_t count;
  void (*run)(int64_t items, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

// The same for any callable body(begin, end), a lambda with captures say.
template <class Body>
void parallel_for(ParallelFor threads, int64_t items, int64_t grain, const Body& body) {
  threads.run(
      items, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace smattn
