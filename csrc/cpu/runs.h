// Backward's work as rows of runs. A row is an outer block, and a run is one inner block of it. A run takes its steps in order. Each step
// first makes something of its own, then adds to two sums: its row's, after the run before it in the row, and its place's, after the run at
// the same place in the row before. So every sum has one order, and runs work at the same time, each a step or a few behind those two. Rows
// form chains, and only rows of one chain share sums. A row's sums lie in one of a few slots. A step may use its part of a slot once the
// last run of the slot's previous row is done with that part.
#pragma once

#include <sched.h>

#include "cpu/tiles/buffer.h"

namespace smattn::cpu::SMATTN_UNIT {

struct Run {
  int64_t row = -1, index = -1;  // the rows of all chains together: the first of each, then the second of each
};

class Runs {
 public:
  Runs(int64_t chains, int64_t rows, int64_t runs, int64_t slots)
      : chains_(chains), rows_(rows), runs_(runs), slots_(slots), taken_(rows), done_(rows * runs) {
    fill<Steps>(taken_, rows, 0);
    fill<Steps>(done_, rows * runs, 0);
  }

  int64_t count() const { return rows_ * runs_; }
  int64_t slot(const Run& run) const { return run.row % slots_; }

  // The next for a worker: of the row that it is in, where that has one, for what is in its cache; else of the row with the fewest taken.
  // Those that a run waits for have been taken before it, so that the earliest of all under way never waits.
  bool take(Run& run) {
    if (run.row >= 0 && take_of(run.row, run)) return true;
    for (;;) {
      int64_t row = rows_, fewest = runs_;
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t taken = taken_of(r);
        if (taken < fewest && may_follow(r, taken)) row = r, fewest = taken;
      }
      if (row == rows_) return false;
      if (take_of(row, run)) return true;
    }
  }

  int64_t bytes() const { return bytes_in(taken_, done_); }

  // Until the run before it in the row has done so many steps, and that at its place in the row before so many.
  void wait(const Run& run, int64_t in_row, int64_t at_place) const {
    if (run.index == 0 && run.row >= slots_) wait_for(run.row - slots_, runs_ - 1, in_row);
    if (run.index > 0) wait_for(run.row, run.index - 1, in_row);
    if (run.row >= chains_) wait_for(run.row - chains_, run.index, at_place);
  }
  void finish(const Run& run, int64_t steps) {
    __atomic_store_n(done_ + run.row * runs_ + run.index, static_cast<Steps>(steps), __ATOMIC_RELEASE);
  }

 private:
  using Steps = int32_t;

  int64_t taken_of(int64_t row) const { return __atomic_load_n(taken_ + row, __ATOMIC_RELAXED); }
  bool may_follow(int64_t row, int64_t index) const {
    return (row < chains_ || taken_of(row - chains_) > index) && (row < slots_ || taken_of(row - slots_) == runs_);
  }
  bool take_of(int64_t row, Run& run) {
    auto index = static_cast<Steps>(taken_of(row));
    while (index < runs_ && may_follow(row, index)) {
      if (__atomic_compare_exchange_n(taken_ + row, &index, index + 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        run = {row, index};
        return true;
      }
    }
    return false;
  }
  void wait_for(int64_t row, int64_t index, int64_t steps) const {
    constexpr int kPatience = 1000;  // then another thread may need this one's core
    for (int i = 0; __atomic_load_n(done_ + row * runs_ + index, __ATOMIC_ACQUIRE) < steps; ++i) {
      if (i >= kPatience) sched_yield();
    }
  }

  const int64_t chains_, rows_, runs_, slots_;
  Buffer<Steps> taken_;  // by row: runs
  Buffer<Steps> done_;  // by row and run
};

}  // namespace smattn::cpu::SMATTN_UNIT
