// The right answers: naive loops in double over the numbered formulas of smattn/reference.py.
#pragma once

#include "array.h"
#include "inputs.h"
#include "problem.h"

namespace smattn::driver {

// A tensor T and A(T), its formula with absolute values in place of signs: what rounding errors scale with.
struct Expected {
  Dense value, magnitude;

  Expected() = default;
  explicit Expected(const Shape& size) : value(size), magnitude(size) {}
  void add(const Shape& at, double x, double size);
};

struct Answers {
  Expected out, lse, mbar;                     // [B, H, Nq, Dv], [B, H, Nq, 1] twice
  Expected dquery, dkey, dvalue, dmask, dalpha;  // inputs' shapes, dalpha [1, H, 1, 1]
  Expected map;                                // [B, 1, Nq, Nk]
  Expected map_dquery, map_dkey, map_dmask, map_dalpha, map_dhead_weights;
  double band = 0.0;                           // allowed error is band * A(T) and the last rounding to T's dtype
};

Answers solve(const Problem& problem, const Inputs& inputs);

}  // namespace smattn::driver
