#include "inputs.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <limits>

namespace smattn::driver {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Dense draw(const Shape& size, const std::function<double()>& number) {
  Dense dense(size);
  std::generate(dense.values.begin(), dense.values.end(), number);
  return dense;
}

// NaN in row j of axis `axis` wherever poisoned(b, j), for every b that the tensor's first axis serves.
void poison(Dense& dense, size_t axis, const std::function<bool(int64_t, int64_t)>& poisoned) {
  for (int64_t b = 0; b < dense.size[0]; ++b)
    for (int64_t h = 0; h < dense.size[1]; ++h)
      for (int64_t i = 0; i < dense.size[2]; ++i)
        for (int64_t j = 0; j < dense.size[3]; ++j)
          if (poisoned(b, axis == 2 ? i : j)) dense.at(b, h, i, j) = kNaN;
}

bool padded_at(const Problem& p, Random& random, int64_t b, int64_t j) {
  switch (p.padding) {
    case Padding::kNone: return false;
    case Padding::kRandom: return random.chance(0.3);
    case Padding::kTail: return j >= p.size.Nk - (p.size.Nk * (b + 1)) / (p.size.B + 2);
    case Padding::kAllButLast: return j != p.size.Nk - 1;
    case Padding::kDeadBatch: return b == 0 || random.chance(0.3);
  }
  return false;
}

void draw_padding(const Problem& p, Random& random, Inputs& in) {
  const auto [B, Nk] = std::array{p.size.B, p.size.Nk};
  in.padded.resize(static_cast<size_t>(B * Nk));
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t j = 0; j < Nk; ++j) in.padded[static_cast<size_t>(b * Nk + j)] = padded_at(p, random, b, j);
    const auto first = in.padded.begin() + b * Nk;
    in.dead.push_back(std::all_of(first, first + Nk, [](bool x) { return x; }));
  }
  if (p.padding == Padding::kNone) return;
  in.padding_stride[0] = p.padding_transposed ? 1 : Nk;
  in.padding_stride[1] = p.padding_transposed ? B : 1;
  in.padding = Guarded(B * Nk);
  for (int64_t k = 0; k < B * Nk; ++k) {
    static_cast<bool*>(in.padding.data())[k / Nk * in.padding_stride[0] + k % Nk * in.padding_stride[1]] =
        in.padded[static_cast<size_t>(k)];
  }
  in.padding.seal();
}

void add_oddity(const Problem& p, Random& random, Dense& mask) {
  if (p.oddity == Oddity::kFarFromZero) {
    for (double& m : mask.values) m += 20000.0;
    return;
  }
  const bool is_nan = p.oddity == Oddity::kNaNInMask;
  const double lowest = p.mask_dtype == DType::kFloat16 ? -65504.0 : -1e30;
  const double odd = is_nan ? kNaN : p.oddity == Oddity::kVeryNegativeInMask ? lowest : -std::numeric_limits<double>::infinity();
  const double often = is_nan ? 3.0 / static_cast<double>(mask.values.size() + 1) : 0.2;
  for (double& m : mask.values) m = random.chance(often) ? odd : m;
  for (size_t first = 0; !is_nan && first < mask.values.size(); first += static_cast<size_t>(p.size.Nk)) {
    // in some rows the first half of the keys, and so whole blocks of them
    if (random.chance(0.3)) std::fill_n(mask.values.begin() + static_cast<std::ptrdiff_t>(first), p.size.Nk / 2, odd);
  }
  for (size_t k = 0; !is_nan && k < mask.values.size(); ++k) {  // the last key keeps an ordinary score
    if (p.mask.expanded[3] || static_cast<int64_t>(k) % p.size.Nk == p.size.Nk - 1) mask.values[k] = 0.5;
  }
}

void draw_mask(const Problem& p, Random& random, const std::vector<bool>& padded, Inputs& in) {
  const DType acc = accumulator_of(p.dtype);
  Dense mask = draw({p.mask_size[0], p.mask_size[1], p.mask_size[2], p.size.Nk},
                    [&] { return p.mask_is_logits ? 3.0 * random.normal() : random.uniform(); });
  if (p.oddity != Oddity::kNone) add_oddity(p, random, mask);
  const auto unseen = [&](int64_t mask, int64_t j) {  // padded wherever this element is used
    for (int64_t b = 0; b < p.size.B; ++b) {
      const bool used = p.mask.expanded[0] || p.mask_batch.mask_of(b) == mask;
      if (used && !padded[static_cast<size_t>(b * p.size.Nk + j)]) return false;
    }
    return p.size.B > 0 && !p.mask.expanded[3];
  };
  poison(mask, 3, unseen);
  in.mask = Array(p.mask_dtype, mask, p.mask);
  Layout layout;
  layout.expanded[3] = p.alpha_shared;
  const double last = p.oddity == Oddity::kNone ? -2.0 : 2.0;  // a negative alpha would turn -inf into +inf
  const double unit = p.oddity == Oddity::kFarFromZero ? 1e-5 : 1.0;
  in.alpha = Array(acc, draw({1, 1, 1, p.size.H}, [&] { return unit * random.pick<double>({32.0, 16.0, 4.0, 1.0, last}); }), layout);
}

}  // namespace

Inputs make_inputs(const Problem& p) {
  Random random(static_cast<uint64_t>(p.index) * 2 + 1);
  const auto normal = [&] { return random.normal(); };
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = p.size;
  const DType acc = accumulator_of(p.dtype);
  Inputs in;
  in.seed = random.bits();
  draw_padding(p, random, in);
  const auto padded = [&](int64_t b, int64_t j) { return bool{in.padded[static_cast<size_t>(b * p.size.Nk + j)]}; };
  const auto dead = [&](int64_t b, int64_t) { return bool{in.dead[static_cast<size_t>(b)]}; };

  Dense key = draw({B, Hkv, Nk, D}, normal), value = draw({B, Hkv, Nk, Dv}, normal);
  Dense dout = draw({B, H, Nq, Dv}, normal), dmap = draw({B, 1, Nq, Nk}, normal), dlse = draw({B, 1, H, Nq}, normal);
  poison(key, 2, padded), poison(value, 2, padded), poison(dout, 3, dead), poison(dlse, 3, dead);
  poison(dmap, 3, [&](int64_t b, int64_t j) { return dead(b, j) || (padded(b, j) && !p.dmap.expanded[3]); });

  in.query = Array(p.dtype, draw({B, H, Nq, D}, normal), p.query);
  in.key = Array(p.dtype, key, p.key);
  in.value = Array(p.dtype, value, p.value);
  in.dout = Array(p.dtype, dout, p.dout);
  in.dmap = Array(acc, dmap, p.dmap);
  if (p.has_mask) draw_mask(p, random, in.padded, in);
  if (p.has_dlse) in.dlse = Array(acc, dlse);
  in.head_weights = Array(acc, draw({1, 1, 1, H}, normal));
  return in;
}

}  // namespace smattn::driver
