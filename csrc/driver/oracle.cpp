#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "philox.h"

namespace smattn::driver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A number and its magnitude. Padding is selected before any product, so no 0 is ever multiplied by a NaN that nobody asked for.
struct Number {
  long double value = 0.0;
  double magnitude = 0.0;

  Number() = default;
  Number(long double value) : value(value), magnitude(static_cast<double>(std::fabs(value))) {}  // NOLINT: a plain one is a number
  Number(long double value, double magnitude) : value(value), magnitude(magnitude) {}
  Number& operator+=(const Number& x) {
    value += x.value, magnitude += x.magnitude;
    return *this;
  }
};

Number operator*(const Number& x, const Number& y) { return {x.value * y.value, x.magnitude * y.magnitude}; }
Number operator-(const Number& x, const Number& y) { return {x.value - y.value, x.magnitude + y.magnitude}; }

void add(Expected& sum, const Shape& at, const Number& x) {
  const size_t place = sum.value.place(at[0], at[1], at[2], at[3]);
  sum.value.values[place] += x.value;
  sum.magnitude.values[place] += x.magnitude;
}

void add_weighted(Expected& sum, const Shape& at, const Number& weight, const Number& x) {
  const Number term = weight * x;
  add(sum, at, term);
  const auto size = static_cast<double>(term.value);
  sum.squares.at(at[0], at[1], at[2], at[3]) += size * size;
}

class Oracle {
 public:
  Oracle(const Problem& problem, const Inputs& inputs);
  Answers take() { return std::move(answers_); }

 private:
  void softmax(int64_t b, int64_t h, int64_t i);
  void forward(int64_t b, int64_t h, int64_t i);
  void backward(int64_t b, int64_t h, int64_t i);
  void map_backward(int64_t b, int64_t h, int64_t i);
  void score_gradients(int64_t b, int64_t h, int64_t i, const Number& dl, Expected& dq, Expected& dk, Expected& dm, Expected& da);

  bool padded(int64_t b, int64_t j) const { return in_.padded[static_cast<size_t>(b * p_.size.Nk + j)]; }
  long double keep(int64_t b, int64_t h, int64_t i, int64_t j) const;  // C/(1-p) of (3)
  int64_t kv(int64_t h) const { return h / (p_.size.H / p_.size.Hkv); }
  long double soft(int64_t b, int64_t h, int64_t i, int64_t j) const {  // M
    const long double m = mask_.at(p_.mask_batch.mask_of(b), h, i, j);
    return p_.mask_is_logits ? 1.0L / (1.0L + std::exp(-m)) : m;
  }
  long double slope(int64_t b, int64_t h, int64_t i, int64_t j) const {  // of M over what the caller gave
    const long double e = std::exp(-std::fabs(static_cast<long double>(mask_.at(p_.mask_batch.mask_of(b), h, i, j))));
    return p_.mask_is_logits ? e / ((1.0L + e) * (1.0L + e)) : 1.0L;
  }

  const Problem& p_;
  const Inputs& in_;
  Dense query_, key_, value_, mask_, alpha_, dout_, dlse_, head_weights_, dmap_;
  std::vector<int64_t> js_;  // the keys of row (b, h, i) that are attended to
  std::vector<double> row_errors_;  // [Nk] of scores, in units of u
  std::vector<Number> row_ds_;  // [Nk]
  DenseOf<long double> probabilities_;  // [B, H, Nq, Nk]
  Answers answers_;
};

Dense values_of(const Array& array) { return array.present() ? array.values() : Dense(); }

Oracle::Oracle(const Problem& problem, const Inputs& inputs)
    : p_(problem), in_(inputs), query_(values_of(inputs.query)), key_(values_of(inputs.key)), value_(values_of(inputs.value)),
      mask_(values_of(inputs.mask)), alpha_(values_of(inputs.alpha)), dout_(values_of(inputs.dout)), dlse_(values_of(inputs.dlse)),
      head_weights_(values_of(inputs.head_weights)), dmap_(values_of(inputs.dmap)) {
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = p_.size;
  probabilities_ = DenseOf<long double>({B, H, Nq, Nk});
  row_errors_.resize(static_cast<size_t>(Nk)), row_ds_.resize(static_cast<size_t>(Nk));
  Answers& a = answers_;
  a.out = Expected({B, H, Nq, Dv}), a.lse = a.mbar = Expected({B, H, Nq, 1}), a.map = Expected({B, 1, Nq, Nk});
  a.dquery = a.map_dquery = Expected({B, H, Nq, D}), a.dkey = a.map_dkey = Expected({B, Hkv, Nk, D}), a.dvalue = Expected({B, Hkv, Nk, Dv});
  a.dmask = a.map_dmask = Expected({p_.mask_size[0], p_.mask_size[1], p_.mask_size[2], Nk});
  a.dalpha = a.map_dalpha = a.map_dhead_weights = Expected({1, H, 1, 1});
  const auto for_rows = [&](auto&& step) {
    for (int64_t b = 0; b < p_.size.B; ++b) {
      js_.clear();
      for (int64_t j = 0; j < p_.size.Nk; ++j)
        if (!padded(b, j)) js_.push_back(j);
      for (int64_t h = 0; h < p_.size.H; ++h)
        for (int64_t i = 0; i < p_.size.Nq; ++i) step(b, h, i);
    }
  };
  for_rows([&](int64_t b, int64_t h, int64_t i) { softmax(b, h, i); });
  a.band *= epsilon_of(accumulator_of(p_.dtype)) / 2;
  for_rows([&](int64_t b, int64_t h, int64_t i) { forward(b, h, i), backward(b, h, i), map_backward(b, h, i); });
}

long double Oracle::keep(int64_t b, int64_t h, int64_t i, int64_t j) const {
  if (p_.dropout_p == 0.0) return 1.0L;
  const auto bh = static_cast<uint32_t>(b * p_.size.H + h);
  const bool kept = dropout_keeps(in_.seed, bh, static_cast<uint32_t>(i), static_cast<uint32_t>(j), dropout_threshold(p_.dropout_p));
  return kept ? 1.0L / (1.0L - p_.dropout_p) : 0.0L;
}

// How far rounding may push a score, in units of u, half the distance from 1 to the next number. Each partial sum of scale * <q, k> is
// rounded, by at most u of itself, a standard deviation of u/sqrt(3): four of all. The rest is a rounding or two of S, of its parts, of L.
double score_error(double partial_sums_squared, double size) { return 4 * (std::sqrt(partial_sums_squared / 3) + 1 + size); }

// (1), (2), (4) and mbar, and the largest error of a score for the band.
void Oracle::softmax(int64_t b, int64_t h, int64_t i) {
  long double highest = -kInfinity, sum = 0.0;
  for (const int64_t j : js_) {
    long double product = 0.0;
    double squares = 0.0;
    for (int64_t d = 0; d < p_.size.D; ++d) {
      product += p_.scale * static_cast<long double>(query_.at(b, h, i, d)) * key_.at(b, kv(h), j, d);
      squares += static_cast<double>(product * product);
    }
    Number s = product;
    if (p_.has_mask) s += Number(alpha_.at(0, 0, 0, h)) * soft(b, h, i, j);
    highest = std::max(highest, s.value);
    probabilities_.at(b, h, i, j) = s.value;
    row_errors_[static_cast<size_t>(j)] = score_error(squares, s.magnitude);
  }
  for (const int64_t j : js_) sum += std::exp(probabilities_.at(b, h, i, j) - highest);
  for (const int64_t j : js_) {
    long double& p = probabilities_.at(b, h, i, j);
    p = std::exp(p - highest) / sum;
    if (p > 0.0) answers_.band = std::max(answers_.band, row_errors_[static_cast<size_t>(j)]);  // what is exactly 0 stays it
    if (p_.has_mask) add(answers_.mbar, {b, h, i, 0}, Number(p) * soft(b, h, i, j));
  }
  add(answers_.lse, {b, h, i, 0}, {js_.empty() ? -kInfinity : highest + std::log(sum), 1.0});
}

// (3), (9)
void Oracle::forward(int64_t b, int64_t h, int64_t i) {
  for (const int64_t j : js_) {
    const long double p = probabilities_.at(b, h, i, j), weight = p * keep(b, h, i, j);
    for (int64_t c = 0; c < p_.size.Dv; ++c) add_weighted(answers_.out, {b, h, i, c}, weight, value_.at(b, kv(h), j, c));
    add(answers_.map, {b, 0, i, j}, Number(head_weights_.at(0, 0, 0, h)) * p);
  }
}

// (5), (6), (7) of dV
void Oracle::backward(int64_t b, int64_t h, int64_t i) {
  const Number dl = p_.has_dlse && !js_.empty() ? Number(dlse_.at(b, 0, h, i)) : Number();
  Number delta;
  for (const int64_t j : js_) {
    const long double p = probabilities_.at(b, h, i, j), factor = keep(b, h, i, j);
    Number dp;
    for (int64_t c = 0; c < p_.size.Dv; ++c) {
      const Number d = dout_.at(b, h, i, c);
      dp += d * value_.at(b, kv(h), j, c);
      add_weighted(answers_.dvalue, {b, kv(h), j, c}, p * factor, d);
    }
    row_ds_[static_cast<size_t>(j)] = dp = dp * factor;
    delta += Number(p) * dp;
  }
  for (const int64_t j : js_) {
    Number& ds = row_ds_[static_cast<size_t>(j)];
    ds = Number(probabilities_.at(b, h, i, j)) * (ds - (delta - dl));
  }
  Answers& a = answers_;
  score_gradients(b, h, i, dl, a.dquery, a.dkey, a.dmask, a.dalpha);
}

// (10)
void Oracle::map_backward(int64_t b, int64_t h, int64_t i) {
  const Number w = head_weights_.at(0, 0, 0, h);
  Number eta;
  for (const int64_t j : js_) eta += Number(probabilities_.at(b, h, i, j)) * dmap_.at(b, 0, i, j);
  for (const int64_t j : js_) {
    row_ds_[static_cast<size_t>(j)] = w * probabilities_.at(b, h, i, j) * (Number(dmap_.at(b, 0, i, j)) - eta);
  }
  Answers& a = answers_;
  add(a.map_dhead_weights, {0, h, 0, 0}, eta);
  score_gradients(b, h, i, {}, a.map_dquery, a.map_dkey, a.map_dmask, a.map_dalpha);
}

// (7), (8) from row (b, h, i) of dS
void Oracle::score_gradients(int64_t b, int64_t h, int64_t i, const Number& dl, Expected& dq, Expected& dk, Expected& dm, Expected& da) {
  const Number mbar = p_.has_mask ? Number(answers_.mbar.value.at(b, h, i, 0), answers_.mbar.magnitude.at(b, h, i, 0)) : Number();
  for (const int64_t j : js_) {
    const Number ds = row_ds_[static_cast<size_t>(j)];
    for (int64_t d = 0; d < p_.size.D; ++d) {
      add_weighted(dq, {b, h, i, d}, Number(p_.scale) * ds, key_.at(b, kv(h), j, d));
      add_weighted(dk, {b, kv(h), j, d}, Number(p_.scale) * ds, query_.at(b, h, i, d));
    }
    if (!p_.has_mask) continue;
    add(dm, {p_.mask_batch.mask_of(b), h, i, j}, Number(alpha_.at(0, 0, 0, h)) * ds * slope(b, h, i, j));
    // That |M - mbar| and not |M| + |mbar| stands here asks for the centred sum; what an error of mbar does to it is of second order.
    const Number centred = soft(b, h, i, j) - mbar.value;
    add(da, {0, h, 0, 0}, ds * Number(centred.value, centred.magnitude + answers_.band * mbar.magnitude));
  }
  if (p_.has_mask) add(da, {0, h, 0, 0}, mbar * dl);
}

}  // namespace

Answers solve(const Problem& problem, const Inputs& inputs) { return Oracle(problem, inputs).take(); }

}  // namespace smattn::driver
