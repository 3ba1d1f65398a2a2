// What forward computes, and how it is cut into items that run in parallel. Their number depends on the shape alone.
#pragma once

#include "cpu/forward_part.h"
#include "memory.h"

namespace smattn::cpu::SMATTN_UNIT {

// How forward is cut into items that run in parallel: (batch, group of heads, query block, split of the keys).
template <class E>
struct ForwardPlan {
  using T = typename SumOf<E>::type;

  Blocking<T> blocking;
  int64_t group_heads, groups, splits;

  explicit ForwardPlan(const Sizes& n) : blocking(n) {
    constexpr int64_t kGroupBytes = 256 << 10, kPartBytes = kPromisedBytes / 2, kItems = 16;
    const int64_t head_bytes = blocking.queries * (n.D + n.Dv) * static_cast<int64_t>(sizeof(T));
    group_heads = smaller_of(n.H, larger_of<int64_t>(1, kGroupBytes / larger_of<int64_t>(head_bytes, 1)));
    groups = blocks_of(n.H, larger_of<int64_t>(group_heads, 1));
    const int64_t items = larger_of<int64_t>(1, n.B * groups * blocking.query_blocks);
    const int64_t part_bytes = larger_of<int64_t>(1, n.B * n.H * blocking.query_blocks * part_size(n) * static_cast<int64_t>(sizeof(T)));
    splits = smaller_of(smaller_of(blocks_of(kItems, items), larger_of<int64_t>(1, kPartBytes / part_bytes)),
                        larger_of<int64_t>(1, blocking.key_blocks));
  }

  int64_t part_size(const Sizes& n) const { return ForwardPart<E>::size(n, blocking.queries); }
};

}  // namespace smattn::cpu::SMATTN_UNIT
