// The right answers: naive loops in long double over the numbered formulas of smattn/reference.py. (In double they would be no more exact
// than the kernels' own float64.)
#pragma once

#include "array.h"
#include "inputs.h"
#include "problem.h"

namespace smattn::driver {

// A tensor T beside what its errors scale with, element by element: its magnitude A(T), the formula with absolute values in place of signs;
// and where T is a product with value, dout, key or query the sum of its squared terms Q(T), else 0: what a rounding of each weight costs.
struct Expected {
  DenseOf<long double> value;
  Dense magnitude, squares;

  Expected() = default;
  explicit Expected(const Shape& size) : value(size), magnitude(size), squares(size) {}
};

struct Answers {
  Expected out, lse, mbar;                     // [B, H, Nq, Dv], [B, H, Nq, 1] twice
  Expected dquery, dkey, dvalue, dmask, dalpha;  // inputs' shapes, dalpha [1, H, 1, 1]
  Expected map;                                // [B, 1, Nq, Nk]
  Expected map_dquery, map_dkey, map_dmask, map_dalpha, map_dhead_weights;
  double band = 0.0;                           // what rounding of the scores comes to in P, as a share
};

Answers solve(const Problem& problem, const Inputs& inputs);

}  // namespace smattn::driver
