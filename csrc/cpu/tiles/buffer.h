// Scratch memory.
#pragma once

#include <cstddef>
#include <new>

#include "cpu/simd/vec.h"

namespace smattn::cpu::SMATTN_UNIT {

// Scratch memory that is aligned to a cache line and not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : bytes_(size * static_cast<int64_t>(sizeof(T))),
        data_(static_cast<T*>(::operator new(static_cast<std::size_t>(bytes_), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  operator T*() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  int64_t bytes_;
  T* data_;
};

template <class... Holders>
inline int64_t bytes_in(const Holders&... holders) {
  return (holders.bytes() + ...);
}

template <class T>
inline void fill(T* p, int64_t n, T x) {
  for (int64_t i = 0; i < n; ++i) p[i] = x;
}

template <class T>
inline void copy(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

}  // namespace smattn::cpu::SMATTN_UNIT
