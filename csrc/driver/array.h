// The arrays of the driver: dense numbers for the oracle, and strided tensors in guarded memory for the kernels.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "params.h"

namespace smattn::driver {

using Shape = std::array<int64_t, 4>;

int64_t count(const Shape& size);
const char* name_of(DType dtype);
double epsilon_of(DType dtype);  // distance from 1 to the next number
DType accumulator_of(DType dtype);

// Four axes of numbers, row major. An axis of size 1 is read at every index, as in broadcasting.
template <class Real>
struct DenseOf {
  Shape size{};
  std::vector<Real> values;

  DenseOf() = default;
  explicit DenseOf(const Shape& size) : size(size), values(static_cast<size_t>(count(size))) {}
  size_t place(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const auto on = [](int64_t n, int64_t index) { return n == 1 ? 0 : index; };
    return static_cast<size_t>(((on(size[0], b) * size[1] + on(size[1], h)) * size[2] + on(size[2], i)) * size[3] + on(size[3], j));
  }
  Real& at(int64_t b, int64_t h, int64_t i, int64_t j) { return values[place(b, h, i, j)]; }
  Real at(int64_t b, int64_t h, int64_t i, int64_t j) const { return values[place(b, h, i, j)]; }
};
using Dense = DenseOf<double>;

// Pages of its own. The byte after the last one is not mapped, so that even a masked vector load, which AddressSanitizer does not see,
// faults when it reads one element too far; the bytes before the first are poisoned for AddressSanitizer and hold a pattern.
class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(int64_t bytes);
  ~Guarded();
  Guarded(Guarded&& other) noexcept { swap(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    swap(other);
    return *this;
  }

  void* data() const { return data_; }
  void seal();               // from here on a write faults
  bool front_intact() const;  // nothing was written before the first byte

 private:
  void swap(Guarded& other) noexcept;
  std::byte* pages_ = nullptr;
  std::byte* data_ = nullptr;
  size_t mapped_ = 0;
};

// How a tensor lies in memory: its axes from the outermost in, and what is odd about it.
struct Layout {
  std::array<int, 4> order{0, 1, 2, 3};
  std::array<bool, 4> expanded{};  // stride 0: one element serves the whole axis
  std::array<bool, 4> reversed{};  // negative stride
  int64_t step = 1;                // stride of the innermost axis
  int64_t gap = 0;                 // elements between its runs
  int64_t tail = 0;                // elements after the last one: moves the base pointer off its alignment
};

// A strided tensor. What lies between its elements, and all of one that was not filled, is NaN.
class Array {
 public:
  Array() = default;  // absent: data is null
  Array(DType dtype, const Shape& size, const Layout& layout = {});
  Array(DType dtype, const Dense& values, const Layout& layout = {});  // rounds; sealed

  bool present() const { return memory_.data() != nullptr; }
  void* data() const;
  DType dtype() const { return dtype_; }
  int64_t stride(int axis) const { return stride_[static_cast<size_t>(axis)]; }
  Tensor4 tensor() const;
  Dense values() const;
  bool same_bytes(const Array& other) const;
  bool front_intact() const { return !present() || memory_.front_intact(); }

 private:
  int64_t offset(int64_t b, int64_t h, int64_t i, int64_t j) const;
  DType dtype_ = DType::kFloat32;
  Shape size_{}, stride_{};
  int64_t first_ = 0, extent_ = 0;  // place of element (0, 0, 0, 0), and how many elements there are
  Guarded memory_;
};

}  // namespace smattn::driver
