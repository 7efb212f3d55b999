// What tiled_linear.cpp takes for granted: how many lanes a register of this processor has, and how codes of
// weights are multiplied by codes of activations in them. tiled_linear.py explains it.

#pragma once

#include <cstdint>

// Lanes of a register; 0: what this processor has is not known here, and the plain loop does it all.
#if defined(__AVX512VNNI__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 0
#endif
#if WIDTH
#include <immintrin.h>
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int INPUTS = 32;  // activations that share a scale

// Twice the numbers of 4-bit floats (MXFP4), + 12 so that none is negative; of -0 as of 0.
alignas(16) constexpr uint8_t LEVELS[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// INPUTS activations of a row: each is scale * code.
struct Block {
  float scale;
  float sum;      // of the codes, for the zeros of the weights
  int32_t start;  // of the integer sum of q * code, which so becomes that of (q - 128) * code, int4: q - 8
  union {
    int8_t codes[INPUTS];
    int32_t fours[INPUTS / 4];  // what all lanes are multiplied by in one step
  };
};

#if WIDTH
// A lane is an output: its sum, or 4 of its codes.
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef float Floats __attribute__((vector_size(4 * WIDTH)));

// dot: in each lane, 4 codes of its output times 4 of x, all added to its sum.
#if WIDTH == 16
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE Ints levels_of(Ints codes) {
  const __m512i levels = _mm512_broadcast_i32x4(*reinterpret_cast<const __m128i*>(LEVELS));
  return (Ints)_mm512_shuffle_epi8(levels, (__m512i)codes);
}
INLINE Ints dot(Ints sums, Ints codes, int32_t four) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
}
#else
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE Ints levels_of(Ints codes) {
  const __m256i levels = _mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(LEVELS));
  return (Ints)_mm256_shuffle_epi8(levels, (__m256i)codes);
}
#ifdef __AVXVNNI__
INLINE Ints dot(Ints sums, Ints codes, int32_t four) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(four));
}
#endif
#endif

// The sums of 32 inputs: begun, given the products of 8 inputs four times, and ended.
#if WIDTH == 16 || defined(__AVXVNNI__)
template <int BITS, bool FLOATS>
INLINE Ints begin(int32_t start) {
  return Ints{} + start;
}
template <int BITS, bool FLOATS>
INLINE Ints add_products(Ints sums, Ints first, Ints second, const int32_t* fours) {
  return dot(dot(sums, first, fours[0]), second, fours[1]);
}
template <int BITS, bool FLOATS>
INLINE Ints end(Ints sums, int32_t) {
  return sums;
}

#else
// In each lane, the sum of its two halves of 16 bits.
INLINE Ints sum_of_halves(__m256i halves) { return (Ints)_mm256_madd_epi16(halves, _mm256_set1_epi16(1)); }
// In each half, 2 codes times 2 of x; and the same of q, where a code is q + 128.
INLINE __m256i halves(Ints codes, int32_t four) {
  return _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(four));
}
INLINE __m256i halves_of_q(Ints codes, int32_t four) {
  const __m256i q = (__m256i)(codes ^ (Ints{} + 0x80808080));
  return _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(_mm256_set1_epi32(four), q));
}

// What fits into 16 bits: in int4 all products, 8 * 2 * 15 * 127, so that sums stay there until the end; of
// MXFP4 a few, 2 * 2 * 24 * 127; of int8 those of one step, 2 * 128 * 127, and then q needs no start.
template <int BITS, bool FLOATS>
INLINE Ints begin(int32_t start) {
  return Ints{} + (FLOATS ? start : 0);
}
template <int BITS, bool FLOATS>
INLINE Ints add_products(Ints sums, Ints first, Ints second, const int32_t* fours) {
  if constexpr (BITS == 8)
    return sums + sum_of_halves(halves_of_q(first, fours[0])) + sum_of_halves(halves_of_q(second, fours[1]));
  const __m256i both = _mm256_add_epi16(halves(first, fours[0]), halves(second, fours[1]));
  return FLOATS ? sums + sum_of_halves(both) : (Ints)_mm256_add_epi16((__m256i)sums, both);
}
template <int BITS, bool FLOATS>
INLINE Ints end(Ints sums, int32_t start) {
  return BITS == 8 || FLOATS ? sums : sum_of_halves((__m256i)sums) + start;
}
#endif
#endif

}  // namespace
