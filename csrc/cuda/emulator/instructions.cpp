// The instructions that a warp executes together, on the arguments of its 32 lanes.
#include <cmath>
#include <cstring>

#include "emulator.h"

namespace smattn::cuda {
namespace emulator {
namespace {

struct Exchange {
  float value;
  int from;
};

float exchange(const char* name, float x, int from) {
  Exchange mine{x, from};
  collective(name, &mine, [](void* const* all) {
    float values[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) values[lane] = static_cast<Exchange*>(all[lane])->value;
    for (int lane = 0; lane < kWarp; ++lane) {
      auto* one = static_cast<Exchange*>(all[lane]);
      one->value = values[one->from];
    }
  });
  return mine.value;
}

struct Matrices {
  uint32_t* x;
  const void* row;
};

template <bool TRANSPOSED>
void load(void* const* all) {
  for (int i = 0; i < 4; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(matrix[row], static_cast<Matrices*>(all[8 * i + row])->row, sizeof matrix[row]);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint16_t low = TRANSPOSED ? matrix[t][g] : matrix[g][t], high = TRANSPOSED ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<Matrices*>(all[lane])->x[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// Operands to dense matrices, the product in float32, back to the lanes. element(register, half) -> float.
template <int K, class Element>
void multiply(void* const* all, const Element& element) {
  float a[16][K], b[K][8];
  constexpr int kHalves = K / 8;  // elements in a register: 2 of 16 bits, 1 of TF32
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* one = static_cast<const Product*>(all[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kHalves; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][kHalves * (t + 4 * (i >> 1)) + e] = element(one->a[i], e);
      for (int i = 0; i < 2; ++i) b[kHalves * (t + 4 * i) + e][g] = element(one->b[i], e);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* one = static_cast<const Product*>(all[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
      float sum = one->c[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      one->c[i] = sum;
    }
  }
}

template <class T>
float half_of(uint32_t x, int half) {
  return to_float(T{static_cast<uint16_t>(half != 0 ? x >> 16 : x & 0xFFFF)});
}

}  // namespace
}  // namespace emulator

using emulator::collective;

float shuffle_xor(float x, int mask) { return emulator::exchange("shuffle_xor", x, lane_index() ^ mask); }
float shuffle(float x, int from) { return emulator::exchange("shuffle", x, from); }

void load_matrices(uint32_t (&x)[4], const void* row) {
  emulator::check_shared(row, 16, 16);
  emulator::Matrices mine{x, row};
  collective("load_matrices", &mine, emulator::load<false>);
}

void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  emulator::check_shared(row, 16, 16);
  emulator::Matrices mine{x, row};
  collective("load_matrices_transposed", &mine, emulator::load<true>);
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  emulator::Product mine{c, a, {b0, b1}};
  collective("multiply_add", &mine, [](void* const* all) { emulator::multiply<16>(all, emulator::half_of<Half>); });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  emulator::Product mine{c, a, {b0, b1}};
  collective("multiply_add", &mine, [](void* const* all) { emulator::multiply<16>(all, emulator::half_of<BFloat16>); });
}

void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Product mine{c, a, {b0, b1}};
  collective("multiply_add_tf32", &mine, [](void* const* all) {
    emulator::multiply<8>(all, [](uint32_t x, int) {
      float y;
      std::memcpy(&y, &x, sizeof y);
      return y;
    });
  });
}

uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1FFFu : bits;  // to 10 bits of mantissa, ties away from zero
}

}  // namespace smattn::cuda
