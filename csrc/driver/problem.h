// An endless list of odd problems: the same one at the same index, everywhere.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "array.h"
#include "params.h"

namespace smattn::driver {

// splitmix64 (Steele, Lea and Flood, 2014)
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits();
  double uniform();           // in [0, 1)
  double normal();            // mean 0, variance 1
  bool chance(double p) { return uniform() < p; }
  template <class T>
  T pick(const std::vector<T>& choices) {
    return choices[bits() % choices.size()];
  }

 private:
  uint64_t state_;
};

enum class Padding { kNone, kRandom, kTail, kAllButLast, kDeadBatch };
// kFarFromZero: M is 20000 and a little, alpha small. That asks for dalpha's centred sum: dS sums to 0 only up to rounding.
enum class Oddity { kNone, kNaNInMask, kMinusInfInMask, kVeryNegativeInMask, kFarFromZero };

// Which gradients are asked for.
struct Needs {
  bool query = true, key = true, value = true, mask = true, alpha = true, head_weights = true;
};

struct Problem {
  int64_t index = 0;
  Sizes size{};
  DType dtype = DType::kFloat32;
  bool has_mask = true;
  DType mask_dtype = DType::kFloat32;
  bool mask_is_logits = false;
  int64_t mask_size[3] = {1, 1, 1};
  MaskBatch mask_batch;         // without strides
  Oddity oddity = Oddity::kNone;
  Layout query, key, value, mask, dout, dmap;
  bool alpha_shared = false;    // stride 0
  Padding padding = Padding::kNone;
  bool padding_transposed = false;
  bool out_saved = true;        // else backward has no output to take delta from
  bool has_dlse = true;
  double dropout_p = 0.0;
  double scale = 1.0;
  Needs needs;
};

Problem problem_at(int64_t index);
std::string describe(const Problem& problem);

}  // namespace smattn::driver
