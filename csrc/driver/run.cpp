#include "run.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>

namespace smattn::driver {
namespace {

// The outputs of one problem, each added when a kernel is to write it.
class Outputs {
 public:
  void* add(bool asked, const char* name, DType dtype, const Shape& size, const Expected& expected, const Allowance& allowance) {
    outputs_.push_back({name, asked ? Array(dtype, size) : Array(), &expected, allowance});
    return outputs_.back().array.data();
  }
  std::vector<Output> take() { return std::move(outputs_); }

 private:
  std::vector<Output> outputs_;
};

Scores scores_of(const Problem& p, const Inputs& in) {
  Scores s{};
  s.size = p.size;
  s.dtype = p.dtype;
  s.query = in.query.tensor(), s.key = in.key.tensor(), s.mask = in.mask.tensor();
  std::copy_n(p.mask_size, 3, s.mask_size);
  s.mask_batch = p.mask_batch;
  s.mask_batch.stride[0] = s.mask.stride[0] * s.mask_batch.size[1], s.mask_batch.stride[1] = s.mask.stride[0];
  s.mask.stride[0] = 0;
  s.mask_is_logits = p.mask_is_logits;
  s.alpha = in.alpha.data();
  s.alpha_stride = in.alpha.stride(3);
  s.padding = static_cast<const bool*>(in.padding.data());
  std::copy_n(in.padding_stride, 2, s.padding_stride);
  s.scale = p.scale;
  return s;
}

Shape mask_shape(const Problem& p) { return {p.mask_size[0], p.mask_size[1], p.mask_size[2], p.size.Nk}; }

// Products of a 16-bit type may take their weights, P*C/(1-p) or dS, rounded to it: by half its epsilon at most, a standard deviation of
// 1/sqrt(3) of that, each by itself; six times what comes of them all. Nothing else is rounded before its time. Delta, which cancels dP,
// is taken from the output and its remainder, which of float16 alone is rounded itself; their weights are rounded by kernels that multiply
// pairs of bfloat16 alone.
struct Allowances {
  Allowance sum, product, through_delta, product_through_delta;

  Allowances(const Problem& p, double band, bool pairs) {
    const double half = bytes_of(p.dtype) == 2 ? epsilon_of(p.dtype) / 2 : 0.0, deviations = 6 / std::sqrt(3.0);
    const double exact_half = pairs && p.dtype == DType::kBFloat16 ? half : 0.0;  // of the output's weights
    const double remainder = p.dtype == DType::kFloat16 ? half * half : 0.0;
    const double delta = p.out_saved ? band + exact_half + remainder : band;
    sum = {band, 0.0}, product = {band, deviations * half};
    through_delta = {delta, 0.0}, product_through_delta = {delta, deviations * half};
  }
};

// Room for what P is rebuilt from in float32 and float64.
Array normalizer_of(const Problem& p) {
  return accumulator_of(p.dtype) == p.dtype ? Array(p.dtype, {p.size.B, p.size.H, p.size.Nq, 2}) : Array();
}

void run_attention(const cpu::Kernels& kernels, const Problem& p, const Inputs& in, const Answers& a, ParallelFor threads,
                   Outputs& outputs) {
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = p.size;
  const DType acc = accumulator_of(p.dtype);
  ForwardParams f{};
  f.scores = scores_of(p, in);
  f.value = in.value.tensor();
  f.dropout = {p.dropout_p, in.seed};
  const Shape out_size{B, H, Nq, Dv}, row_size{B, H, Nq, 1};
  const bool rounded = acc != p.dtype;
  const Allowances allowed(p, a.band, std::string(kernels.name) == "avx512bf16" || std::string(kernels.name) == "amx");
  f.out = outputs.add(true, "out", p.dtype, out_size, a.out, allowed.product);
  f.lse = outputs.add(true, "lse", acc, row_size, a.lse, allowed.sum);
  const Array remainder = p.out_saved && rounded ? Array(p.dtype, out_size) : Array();  // RemainderOf it has as many bytes
  f.remainder = remainder.data();
  f.mbar = outputs.add(p.needs.alpha, "mbar", acc, row_size, a.mbar, allowed.sum);
  const Array normalizer = normalizer_of(p);
  f.normalizer = normalizer.data();
  kernels.forward(f, threads);

  BackwardParams g{};
  g.scores = f.scores, g.value = f.value, g.dropout = f.dropout;
  g.dout = in.dout.tensor();
  if (p.out_saved) g.out = f.out, g.remainder = f.remainder;
  g.lse = f.lse, g.dlse = in.dlse.data(), g.mbar = f.mbar, g.normalizer = f.normalizer;
  g.dquery = outputs.add(p.needs.query, "dquery", p.dtype, {B, H, Nq, D}, a.dquery, allowed.product_through_delta);
  g.dkey = outputs.add(p.needs.key, "dkey", p.dtype, {B, Hkv, Nk, D}, a.dkey, allowed.product_through_delta);
  g.dvalue = outputs.add(p.needs.value, "dvalue", p.dtype, {B, Hkv, Nk, Dv}, a.dvalue, allowed.product);
  g.dmask = outputs.add(p.needs.mask, "dmask", p.mask_dtype, mask_shape(p), a.dmask, allowed.through_delta);
  g.dalpha = outputs.add(p.needs.alpha, "dalpha", acc, {1, H, 1, 1}, a.dalpha, allowed.through_delta);
  kernels.backward(g, threads);
}

void run_map(const cpu::Kernels& kernels, const Problem& p, const Inputs& in, const Answers& a, ParallelFor threads, Outputs& outputs) {
  const auto& [B, H, Hkv, Nq, Nk, D, Dv] = p.size;
  const DType acc = accumulator_of(p.dtype);
  const Allowance allowed{a.band, 0.0};
  MapParams f{};
  f.scores = scores_of(p, in);
  f.head_weights = in.head_weights.data();
  f.map = outputs.add(true, "map", acc, {B, 1, Nq, Nk}, a.map, allowed);
  f.lse = outputs.add(true, "map's lse", acc, {B, H, Nq, 1}, a.lse, allowed);
  const Array normalizer = normalizer_of(p);
  f.normalizer = normalizer.data();
  kernels.attention_map(f, threads);

  MapBackwardParams g{};
  g.scores = f.scores, g.head_weights = f.head_weights, g.lse = f.lse, g.normalizer = f.normalizer;
  g.dmap = in.dmap.tensor();
  g.dquery = outputs.add(p.needs.query, "map's dquery", p.dtype, {B, H, Nq, D}, a.map_dquery, allowed);
  g.dkey = outputs.add(p.needs.key, "map's dkey", p.dtype, {B, Hkv, Nk, D}, a.map_dkey, allowed);
  g.dmask = outputs.add(p.needs.mask, "map's dmask", p.mask_dtype, mask_shape(p), a.map_dmask, allowed);
  g.dalpha = outputs.add(p.needs.alpha, "map's dalpha", acc, {1, H, 1, 1}, a.map_dalpha, allowed);
  g.dhead_weights = outputs.add(p.needs.head_weights, "dhead_weights", acc, {1, H, 1, 1}, a.map_dhead_weights, allowed);
  kernels.attention_map_backward(g, threads);
}

std::vector<int64_t> counted;

// Runs nothing, and counts the calls of the body that torch would make.
void count(int64_t items, int64_t grain, void (*)(int64_t, int64_t, void*), void*) {
  const auto pieces = [items](int64_t size) { return (items + size - 1) / size; };
  counted.push_back(pieces(pieces(std::min(Workers::kThreads, pieces(grain)))));
}

// Numbers below what a kernel's arithmetic holds become 0 on the way, and the last rounding has a smallest step of its own.
double floor_of(DType dtype) {
  constexpr double kSmallest[] = {0x1p-100, 0x1p-1000, 0x1p-24, 0x1p-100};  // float16's subnormals are in reach
  return kSmallest[static_cast<int>(dtype)];
}

}  // namespace

std::vector<Output> run_kernels(const cpu::Kernels& kernels, const Problem& problem, const Inputs& inputs, const Answers& answers,
                                ParallelFor threads) {
  Outputs outputs;
  run_attention(kernels, problem, inputs, answers, threads, outputs);
  run_map(kernels, problem, inputs, answers, threads, outputs);
  return outputs.take();
}

Workers workers_of(const cpu::Kernels& kernels, const Problem& problem) {
  counted.clear();
  Outputs outputs;
  run_attention(kernels, problem, make_inputs(problem), Answers{}, {Workers::kThreads, count}, outputs);
  return {counted.at(0), counted.at(2)};  // delta is between them
}

Comparison compare(const Output& output) {
  Comparison worst;
  if (!output.array.present()) return worst;
  const Dense actual = output.array.values();
  const auto& [exact, magnitude, squares] = *output.expected;
  const auto [magnitude_share, squares_share] = output.allowance;
  const double epsilon = epsilon_of(output.array.dtype()), floor = floor_of(output.array.dtype());
  for (size_t k = 0; k < actual.values.size(); ++k) {
    const double x = actual.values[k], a = magnitude.values[k];
    const long double y = exact.values[k];
    const bool same = std::isnan(y) ? std::isnan(x) : x == y;
    if (same) continue;
    double share = std::numeric_limits<double>::infinity();
    if (std::isfinite(x) && std::isfinite(y) && a > 0.0) {
      const long double rounding = epsilon / 2 * std::fabs(y) + floor;
      share = static_cast<double>(std::fabs(x - y) / (rounding + magnitude_share * a + squares_share * std::sqrt(squares.values[k])));
    }
    if (share <= worst.share) continue;
    const auto [n1, n2, n3] = std::array{actual.size[1], actual.size[2], actual.size[3]};
    const auto n = static_cast<int64_t>(k);
    std::ostringstream text;
    text.precision(9);
    text << output.name << "[" << n / (n1 * n2 * n3) << ", " << n / (n2 * n3) % n1 << ", " << n / n3 % n2 << ", " << n % n3 << "] is " << x
         << ", not " << y << " (A " << a << ")";
    worst = {share, text.str()};
  }
  return worst;
}

}  // namespace smattn::driver
