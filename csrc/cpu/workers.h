// Items shared out to workers, each with scratch of its own: no more of them at a time than memory holds.
#pragma once

#include "cpu/blocks.h"
#include "parallel.h"

namespace smattn::cpu::SMATTN_LEVEL {

// Of the 16 MiB that a call may take whatever its size: the rest goes to the threads' stacks and to the allocator.
constexpr int64_t kSpare = 13 << 20;

// work(worker, item) for every item, by workers that make() makes; at most `bytes` at a time, but one worker always.
template <class Make, class Work>
inline void for_each_item(ParallelFor threads, int64_t items, int64_t bytes, const Make& make, const Work& work) {
  const int64_t workers = larger_of<int64_t>(1, bytes / make().bytes());
  parallel_for(threads, items, blocks_of(items, workers), [&](int64_t begin, int64_t end) {
    auto worker = make();
    for (int64_t item = begin; item < end; ++item) work(worker, item);
  });
}

}  // namespace smattn::cpu::SMATTN_LEVEL
