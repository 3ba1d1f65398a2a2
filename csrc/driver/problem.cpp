#include "problem.h"

#include <cmath>
#include <sstream>

namespace smattn::driver {
namespace {

constexpr int64_t kMostWork = 40'000'000;  // multiplications of one product: keeps a problem under about a second in a sanitizer's build

Sizes draw_sizes(Random& random) {
  const std::vector<int64_t> head_sizes{1, 3, 8, 32, 33, 48, 64, 96, 128, 200, 256};
  Sizes size{};
  size.B = random.pick<int64_t>({1, 1, 2, 2, 3, 4, 6});
  size.Hkv = random.pick<int64_t>({1, 1, 2});
  size.H = size.Hkv * random.pick<int64_t>({1, 1, 2, 3});
  size.Nq = random.pick<int64_t>({1, 2, 4, 13, 16, 17, 64, 65, 130, 193});
  size.Nk = random.pick<int64_t>({1, 7, 128, 129, 500});
  if (size.Nq <= 17 && random.chance(0.2)) size.Nk = 3001;  // so few queries that the keys are split among threads
  if (random.chance(0.06)) (random.chance(0.5) ? size.Nq : size.Nk) = 0;
  if (random.chance(0.01)) size.B = 0;
  size.D = random.pick(head_sizes);
  size.Dv = random.chance(0.5) ? size.D : random.pick(head_sizes);
  const int64_t heads_that_fit = kMostWork / (1 + size.Nq * size.Nk * (size.D + size.Dv));
  if (size.B * size.H > heads_that_fit) size.B = 1;
  if (size.H > heads_that_fit) size.H = size.Hkv = 1;
  return size;
}

Layout draw_layout(Random& random, const std::vector<std::array<int, 4>>& orders) {
  Layout layout;
  layout.order = random.pick(orders);
  layout.gap = random.pick<int64_t>({0, 0, 1, 5});
  layout.tail = random.pick<int64_t>({0, 0, 1, 3});
  return layout;
}

// Rows of query, key or value: the last axis lies together, heads may come before or after the rows, or share one's rows.
Layout draw_rows(Random& random) {
  Layout layout = draw_layout(random, {{0, 1, 2, 3}, {0, 2, 1, 3}, {2, 0, 1, 3}});
  layout.expanded[1] = random.chance(0.1);
  return layout;
}

// Any strides at all, for what a kernel must read in place.
Layout draw_any(Random& random) {
  Layout layout = draw_layout(random, {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 1, 3, 2}, {0, 2, 3, 1}, {3, 2, 1, 0}});
  layout.step = random.pick<int64_t>({1, 1, 1, 2});
  for (size_t axis = 1; axis < 4; ++axis) layout.expanded[axis] = random.chance(0.1);
  for (size_t axis = 0; axis < 4; ++axis) layout.reversed[axis] = random.chance(0.05);
  return layout;
}

// Which batch elements share a mask: all, none, those of one outer or those of one inner index.
void draw_mask_batch(Random& random, Problem& p) {
  MaskBatch& batch = p.mask_batch;
  const int64_t B = p.size.B, inner = B % 2 == 0 ? 2 : B;
  if (p.mask_size[0] == 1) return;
  const int way = B == 0 ? 0 : random.pick<int>({0, 1, 2});
  batch.inner = way == 0 ? 1 : inner;
  batch.size[0] = way == 0 ? B : way == 1 ? B / inner : 1;
  batch.size[1] = way == 2 ? inner : 1;
  if (batch.size[0] == 1 && batch.size[1] == 1) batch.inner = 1;
  p.mask_size[0] = batch.masks();
}

void draw_mask(Random& random, Problem& p) {
  p.has_mask = random.chance(0.85);
  p.mask_dtype = random.chance(0.5) ? accumulator_of(p.dtype)
                                    : random.pick<DType>({DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16});
  const int64_t full[3] = {p.size.B, p.size.H, p.size.Nq};
  p.mask = draw_any(random);
  p.mask.expanded[0] = random.chance(0.1);
  for (size_t axis = 0; axis < 3; ++axis) {
    p.mask_size[axis] = random.chance(axis == 1 ? 0.6 : 0.3) ? 1 : full[axis];
  }
  draw_mask_batch(random, p);
  for (size_t axis = 0; axis < 3; ++axis) {
    if (p.mask_size[axis] == 1) p.mask.expanded[axis] = true;  // the contract: stride 0 on an axis of size 1
  }
  p.alpha_shared = random.chance(0.3);
  p.oddity = random.pick<Oddity>({Oddity::kNone, Oddity::kNone, Oddity::kNone, Oddity::kNone, Oddity::kNone, Oddity::kNone,
                                  Oddity::kNaNInMask, Oddity::kMinusInfInMask, Oddity::kVeryNegativeInMask, Oddity::kFarFromZero});
}

}  // namespace

uint64_t Random::bits() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

double Random::uniform() { return std::ldexp(static_cast<double>(bits() >> 11), -53); }

double Random::normal() {
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
  return radius * std::cos(2.0 * 3.141592653589793 * uniform());
}

Problem problem_at(int64_t index) {
  Random random(static_cast<uint64_t>(index) + 0x736D6174746Eu);
  Problem p;
  p.index = index;
  p.dtype = random.pick<DType>({DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16});
  p.size = draw_sizes(random);
  p.query = draw_rows(random), p.key = draw_rows(random), p.value = draw_rows(random);
  draw_mask(random, p);
  p.dout = draw_any(random), p.dmap = draw_any(random);
  p.padding =
      random.pick<Padding>({Padding::kNone, Padding::kNone, Padding::kRandom, Padding::kTail, Padding::kAllButLast, Padding::kDeadBatch});
  p.padding_transposed = random.chance(0.3);
  p.out_saved = random.chance(0.8);
  p.has_dlse = random.chance(0.5);
  p.dropout_p = random.chance(0.3) ? random.pick<double>({0.1, 0.5, 0.9}) : 0.0;
  p.scale = random.chance(0.2) ? -0.37 : 1.0 / std::sqrt(static_cast<double>(p.size.D));
  if (random.chance(0.5)) {
    p.needs = {random.chance(0.5), random.chance(0.5), random.chance(0.5), random.chance(0.5), random.chance(0.5), random.chance(0.5)};
  }
  if (p.oddity == Oddity::kNaNInMask) p.dropout_p = 0.0;             // NaN times a dropped 0 is nobody's promise
  if (p.oddity == Oddity::kMinusInfInMask) p.needs.alpha = false;    // dalpha sums dS * M: 0 times -inf
  if (p.oddity == Oddity::kMinusInfInMask || p.oddity == Oddity::kVeryNegativeInMask) {
    p.padding = Padding::kNone;  // or a row might have no key of an ordinary score: no softmax, or one that no tolerance describes
  }
  if (p.oddity == Oddity::kFarFromZero) {
    p.has_dlse = false;  // or mbar * dL would hide the rest of dalpha
    p.needs.alpha = true;
    p.mask_dtype = accumulator_of(p.dtype);  // in 16 bits the little would be rounded away
  }
  p.mask_is_logits = p.has_mask && p.oddity != Oddity::kFarFromZero && random.chance(0.25);
  p.needs.mask = p.needs.mask && p.has_mask;
  p.needs.alpha = p.needs.alpha && p.has_mask;
  return p;
}

std::string describe(const Problem& p) {
  constexpr const char* kPadding[] = {"none", "random", "tail", "all but the last", "a dead batch"};
  constexpr const char* kOddity[] = {"", " with NaN", " with -inf", " with very low scores", " far from zero"};
  std::ostringstream text;
  text << "problem " << p.index << ": " << name_of(p.dtype) << " B" << p.size.B << " H" << p.size.H << "/" << p.size.Hkv << " Nq"
       << p.size.Nq << " Nk" << p.size.Nk << " D" << p.size.D << " Dv" << p.size.Dv;
  if (p.has_mask) {
    text << (p.mask_is_logits ? " mask logits " : " mask ") << name_of(p.mask_dtype) << " (" << p.mask_batch.size[0] << ", "
         << p.mask_batch.size[1] << ", " << p.mask_size[1] << ", " << p.mask_size[2] << ", " << p.size.Nk << ")"
         << kOddity[static_cast<int>(p.oddity)];
  }
  text << " padding " << kPadding[static_cast<int>(p.padding)] << " dropout " << p.dropout_p << (p.has_dlse ? " dL" : "") << " needs ";
  const auto need = [&](bool needed, const char* name) { text << (needed ? name : ""); };
  need(p.needs.query, "q"), need(p.needs.key, "k"), need(p.needs.value, "v");
  need(p.needs.mask, "m"), need(p.needs.alpha, "a"), need(p.needs.head_weights, "w");
  return text.str();
}

}  // namespace smattn::driver
