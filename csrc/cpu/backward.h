// Backward, (5)-(8): P is rebuilt, tile by tile, from what forward left of each row.
#pragma once

#include "cpu/backward_delta.h"
#include "cpu/backward_worker.h"

namespace smattn::cpu::SMATTN_UNIT {

// The groups of a round, by a plan in runs: each is a chain.
template <class T, class Make>
inline void share_out_runs(const BackwardPlan<T>& plan, int64_t first, int64_t groups, ParallelFor threads, int64_t bytes,
                           const Make& make) {
  Runs runs(groups, groups * plan.outer_blocks(), plan.inner_blocks(), plan.row_slots);
  share_out<Run>(
      threads, runs.count(), bytes - runs.bytes(), [&](Run& run) { return runs.take(run); }, make,
      [&](auto& worker, const Run& run) { worker.run(first + run.row % groups, run.row % groups, run.row / groups, run, runs); });
}

// (6)-(8). Delta is there, or begin_round(parts, first, groups, bytes) makes it for the groups of a round, with workers of so many bytes.
template <class E, class T, class BeginRound>
inline void backward_pass(const BackwardTask<T>& task, const BackwardPlan<T>& plan, ParallelFor threads, const BeginRound& begin_round) {
  BackwardParts<T> parts(plan);
  const auto make = [&] { return BackwardWorker<E>(task, plan, parts); };
  const int64_t spare = plan.memory.for_workers(parts.bytes());
  for (int64_t first = 0; first < plan.groups; first += plan.round) {
    const int64_t groups = smaller_of(plan.round, plan.groups - first);
    begin_round(parts, first, groups, spare);
    if (plan.in_runs) {
      share_out_runs(plan, first, groups, threads, spare, make);
    } else {
      for_each_item(threads, groups * plan.splits, spare, make, [&](BackwardWorker<E>& worker, int64_t item) {
        worker.run(first + item / plan.splits, item / plan.splits, item % plan.splits);
      });
    }
    if (plan.dmask_rows > 0) store_key_dmask(task, plan, parts, first, groups, threads);
    if (plan.shares > 1 && plan.mask_of(first + groups) > plan.mask_of(first))
      store_shares(task, plan, parts, plan.mask_of(first), threads);
    if (!plan.wants_parts) continue;
    parallel_for(threads, plan.part_items() / plan.round * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) store_sum(task, plan, parts, first, item);
      drain();
    });
  }
  if (task.dalpha != nullptr) store_dalpha(task, plan, parts);
}

template <class E>
inline void backward_of(const BackwardParams& p, ParallelFor threads) {
  using T = SumOf<E>;
  const Sizes& n = p.scores.size;
  const Buffer<T> delta(n.B * n.H * n.Nq);
  const BackwardTask<T> task{.scores = p.scores,
                             .value = p.value,
                             .dout = p.dout,
                             .dropout = p.dropout,
                             .dmap = {},
                             .head_weights = nullptr,
                             .lse = static_cast<const T*>(p.lse),
                             .normalizer = static_cast<const T*>(p.normalizer),
                             .delta = delta,
                             .mbar = static_cast<const T*>(p.mbar),
                             .dlse = static_cast<const T*>(p.dlse),
                             .dquery = p.dquery,
                             .dkey = p.dkey,
                             .dvalue = p.dvalue,
                             .dmask = p.dmask,
                             .dalpha = static_cast<T*>(p.dalpha),
                             .has_remainder = p.remainder != nullptr};
  if (is_empty(n)) return store_zeros(task);
  if (task.wants_ds()) {
    compute_delta<E>(p, threads, delta.get());
  } else {
    fill<T>(delta, n.B * n.H * n.Nq, T(0));
  }
  backward_pass<E>(task, BackwardPlan<T>(task), threads, [](const BackwardParts<T>&, int64_t, int64_t, int64_t) {});
}

}  // namespace smattn::cpu::SMATTN_UNIT
