// Numbers that lie side by side in a tensor, a vector of them at a time: the conversions of dtype.h, bit for bit but for a NaN's payload.
#pragma once

#include <type_traits>

#include "cpu/simd/vec.h"
#include "dtype.h"

namespace smattn::cpu::SMATTN_UNIT {

// Whether numbers stored as `Storage` become T, and back, a vector at a time. A compiler left to vectorise such a loop first tests what may
// overlap, which takes as long as a short row. bfloat16 with AVX-512 alone: two vectors of AVX2 at a time, as compilers do it, are faster
// than one.
template <class T, class Storage>
constexpr bool kByVector = std::is_same_v<T, Storage>;
inline Vec<float> load_widened(const float* p) { return load(p); }
inline Vec<double> load_widened(const double* p) { return load(p); }
inline void store_narrowed(float* p, Vec<float> x) { store(p, x); }
inline void store_narrowed(double* p, Vec<double> x) { store(p, x); }
#if defined(__AVX512F__)  // the maskz forms, because gcc 12 warns inside the plain ones
template <>
constexpr bool kByVector<float, BFloat16> = true;
template <>
constexpr bool kByVector<float, Half> = true;
typedef uint32_t WordsOf32 __attribute__((vector_size(kVectorBytes)));
inline __m256i words_at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_words(void* p, __m256i words) { _mm256_storeu_si256(static_cast<__m256i*>(p), words); }
inline Vec<float> load_widened(const BFloat16* p) {
  return (Vec<float>)((WordsOf32)_mm512_maskz_cvtepu16_epi32(0xffff, words_at(p)) << 16);
}
inline Vec<float> load_widened(const Half* p) { return _mm512_maskz_cvtph_ps(0xffff, words_at(p)); }
inline __m256i narrowed(Vec<float> x, const BFloat16*) {
  const WordsOf32 bits = (WordsOf32)x, nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordsOf32 numbers = x == x ? nearest : WordsOf32{} + 0x7fc0u;
  return _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)numbers);
}
inline __m256i narrowed(Vec<float> x, const Half*) { return _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT); }
inline void store_narrowed(BFloat16* p, Vec<float> x) { store_words(p, narrowed(x, p)); }
inline void store_narrowed(Half* p, Vec<float> x) { store_words(p, narrowed(x, p)); }
inline void store_remainders(int16_t* p, Vec<float> x, const BFloat16* rounded) {
  const WordsOf32 distance = (WordsOf32)x - (WordsOf32)load_widened(rounded);
  store_words(p, _mm512_maskz_cvtsepi32_epi16(0xffff, (__m512i)distance));
}
inline Vec<float> load_unrounded(const BFloat16* p, const int16_t* remainder) {
  return (Vec<float>)((WordsOf32)load_widened(p) + (WordsOf32)_mm512_maskz_cvtepi16_epi32(0xffff, words_at(remainder)));
}
#elif defined(__F16C__)
template <>
constexpr bool kByVector<float, Half> = true;
inline Vec<float> load_widened(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_narrowed(Half* p, Vec<float> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
template <>
constexpr bool kByVector<float, Half> = true;
inline Vec<float> load_widened(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
inline void store_narrowed(Half* p, Vec<float> x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
#endif
#if defined(__F16C__) || defined(__aarch64__)
inline void store_remainders(Half* p, Vec<float> x, const Half* rounded) {
  store_narrowed(p, (x - load_widened(rounded)) * kRemainderScale);
}
inline Vec<float> load_unrounded(const Half* p, const Half* remainder) {
  return load_widened(p) + load_widened(remainder) / kRemainderScale;
}
#endif

// Whether two vectors of T, narrowed, fill a cache line of `Storage` and can be stored past the caches.
template <class T, class Storage>
constexpr bool kStreamsTwo = kVectorBytes == 64 && sizeof(Storage) == 2 && kByVector<T, Storage>;
// Whether that, or one vector of T as it is.
template <class T, class Storage>
constexpr bool kStreams = std::is_same_v<T, Storage> || kStreamsTwo<T, Storage>;
inline void stream_narrowed(float* p, const float* from) { stream(p, load(from)); }
inline void stream_narrowed(double* p, const double* from) { stream(p, load(from)); }
#if defined(__AVX512F__)
template <class Storage>
inline void stream_narrowed(Storage* p, Vec<float> first, Vec<float> second) {
  const __m512i low = _mm512_castsi256_si512(narrowed(first, p));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_mask_broadcast_i64x4(low, 0xf0, narrowed(second, p)));
}
template <class Storage>
inline void stream_narrowed(Storage* p, const float* from) {
  stream_narrowed(p, load(from), load(from + kLanes<float>));
}
#endif

}  // namespace smattn::cpu::SMATTN_UNIT
