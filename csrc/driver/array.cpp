#include "array.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace smattn::driver {
namespace {

constexpr std::byte kFront{0xA5};

// The two 16-bit formats by their number of mantissa bits; the exponent takes the other bits but the sign.
constexpr int kHalfMantissa = 10, kBFloatMantissa = 7;

double decode16(uint16_t bits, int mantissa) {
  const int bias = (1 << (14 - mantissa)) - 1;
  const int exponent = (bits & 0x7FFF) >> mantissa;
  const int fraction = bits & ((1 << mantissa) - 1);
  double magnitude = 0.0;
  if (exponent == 2 * bias + 1) {
    magnitude = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - mantissa);
  } else {
    magnitude = std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// To the nearest, ties to even; past the largest number to infinity.
uint16_t encode16(double x, int mantissa) {
  const int bias = (1 << (14 - mantissa)) - 1;
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const auto infinity = static_cast<uint16_t>((2 * bias + 1) << mantissa);
  if (std::isnan(x)) return infinity | 1;
  if (x == 0.0 || std::isinf(x)) return static_cast<uint16_t>(sign | (x == 0.0 ? 0 : infinity));
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), mantissa - exponent)));
  // A carry out of the mantissa goes into the exponent by itself, a subnormal has exponent field 0 the same way.
  const int bits = ((exponent + bias - 1) << mantissa) + units;
  return static_cast<uint16_t>(sign | std::min(bits, static_cast<int>(infinity)));
}

template <class T>
T read(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

double decode(DType dtype, const void* p) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<double>(read<float>(p));
    case DType::kFloat64: return read<double>(p);
    case DType::kFloat16: return decode16(read<uint16_t>(p), kHalfMantissa);
    case DType::kBFloat16: return decode16(read<uint16_t>(p), kBFloatMantissa);
  }
  std::abort();
}

void encode(DType dtype, double x, void* p) {
  switch (dtype) {
    case DType::kFloat64: std::memcpy(p, &x, 8); return;
    case DType::kFloat32: {
      const auto y = static_cast<float>(x);
      std::memcpy(p, &y, 4);
      return;
    }
    case DType::kFloat16:
    case DType::kBFloat16: {
      const uint16_t bits = encode16(x, dtype == DType::kFloat16 ? kHalfMantissa : kBFloatMantissa);
      std::memcpy(p, &bits, 2);
      return;
    }
  }
}

template <class Visit>
void for_each(const Shape& size, const Visit& visit) {
  for (int64_t b = 0; b < size[0]; ++b)
    for (int64_t h = 0; h < size[1]; ++h)
      for (int64_t i = 0; i < size[2]; ++i)
        for (int64_t j = 0; j < size[3]; ++j) visit(b, h, i, j);
}

}  // namespace

int64_t count(const Shape& size) { return size[0] * size[1] * size[2] * size[3]; }

const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16"};
  return kNames[static_cast<int>(dtype)];
}

double epsilon_of(DType dtype) {
  constexpr int kMantissa[] = {23, 52, kHalfMantissa, kBFloatMantissa};
  return std::ldexp(1.0, -kMantissa[static_cast<int>(dtype)]);
}

DType accumulator_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

Guarded::Guarded(int64_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapped_ = (static_cast<size_t>(bytes) / page + 2) * page;  // the last page is the guard; at least a byte lies in front
  void* pages = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED || mprotect(static_cast<std::byte*>(pages) + mapped_ - page, page, PROT_NONE) != 0) {
    std::perror("guarded memory");
    std::abort();
  }
  pages_ = static_cast<std::byte*>(pages);
  data_ = pages_ + (mapped_ - page - static_cast<size_t>(bytes));
  std::fill(pages_, data_, kFront);
  ASAN_POISON_MEMORY_REGION(pages_, static_cast<size_t>(data_ - pages_));
}

Guarded::~Guarded() {
  if (pages_ == nullptr) return;
  ASAN_UNPOISON_MEMORY_REGION(pages_, mapped_);
  munmap(pages_, mapped_);
}

void Guarded::swap(Guarded& other) noexcept {
  std::swap(pages_, other.pages_);
  std::swap(data_, other.data_);
  std::swap(mapped_, other.mapped_);
}

void Guarded::seal() { mprotect(pages_, mapped_ - static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_READ); }

bool Guarded::front_intact() const {
  ASAN_UNPOISON_MEMORY_REGION(pages_, static_cast<size_t>(data_ - pages_));
  const bool intact = std::all_of(pages_, data_, [](std::byte x) { return x == kFront; });
  ASAN_POISON_MEMORY_REGION(pages_, static_cast<size_t>(data_ - pages_));
  return intact;
}

Array::Array(DType dtype, const Shape& size, const Layout& layout) : dtype_(dtype), size_(size) {
  int64_t stride = layout.step, last = 0;
  for (size_t k = 4; k-- > 0;) {
    const auto axis = static_cast<size_t>(layout.order[k]);
    if (!layout.expanded[axis]) {
      stride_[axis] = layout.reversed[axis] ? -stride : stride;
      last += (size[axis] - 1) * stride;
      if (layout.reversed[axis]) first_ += (size[axis] - 1) * stride;
      stride *= std::max<int64_t>(size[axis], 1);
    }
    if (k == 3) stride += layout.gap;
  }
  extent_ = count(size) == 0 ? 0 : last + 1 + layout.tail;
  if (extent_ == 0) first_ = 0;
  memory_ = Guarded(extent_ * bytes_of(dtype));
  for (int64_t k = 0; k < extent_; ++k) {
    encode(dtype, std::numeric_limits<double>::quiet_NaN(), static_cast<std::byte*>(memory_.data()) + k * bytes_of(dtype));
  }
}

Array::Array(DType dtype, const Dense& values, const Layout& layout) : Array(dtype, values.size, layout) {
  for_each(size_, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    encode(dtype_, values.at(b, h, i, j), static_cast<std::byte*>(data()) + offset(b, h, i, j) * bytes_of(dtype_));
  });
  memory_.seal();
}

void* Array::data() const { return present() ? static_cast<std::byte*>(memory_.data()) + first_ * bytes_of(dtype_) : nullptr; }

int64_t Array::offset(int64_t b, int64_t h, int64_t i, int64_t j) const {
  return b * stride_[0] + h * stride_[1] + i * stride_[2] + j * stride_[3];
}

Tensor4 Array::tensor() const { return {data(), dtype_, {stride_[0], stride_[1], stride_[2], stride_[3]}}; }

Dense Array::values() const {
  Dense dense(size_);
  for_each(size_, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    dense.at(b, h, i, j) = decode(dtype_, static_cast<const std::byte*>(data()) + offset(b, h, i, j) * bytes_of(dtype_));
  });
  return dense;
}

bool Array::same_bytes(const Array& other) const {
  if (!present() || !other.present()) return present() == other.present();
  return extent_ == other.extent_ &&
         std::memcmp(memory_.data(), other.memory_.data(), static_cast<size_t>(extent_ * bytes_of(dtype_))) == 0;
}

}  // namespace smattn::driver
