// How results get their memory quickly.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace smattn {

// A result is fresh memory more often than not, for the allocator gave the last one back. To fault it in page by page can take longer than
// to compute it (1.5 microseconds for 4 KiB on a virtual machine); by huge pages that is nothing.
//
// Asks the system for huge pages under what is not yet touched of memory, those that it shares with its neighbours included: results
// that are made together lie side by side.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = begin / kHugePage * kHugePage, last = (end + kHugePage - 1) / kHugePage * kHugePage;
  if (end - begin >= kHugePage)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: where it fails, nothing is lost
#endif
}

}  // namespace smattn
