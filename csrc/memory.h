// How much memory a call may take.
#pragma once

#include <cstdint>

namespace smattn {

// The promise on extra memory, whose rule is written in smattn/memory.py: the size of inputs, outputs and gradients divided by
// kPromisedShare, and kPromisedBytes whatever the size.
constexpr int64_t kPromisedShare = 4;
constexpr int64_t kPromisedBytes = int64_t{16} << 20;

}  // namespace smattn
