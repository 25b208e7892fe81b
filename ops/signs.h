// The signs of an activation, a bit each: all that the gradient of a leaky ReLU needs of it, in a 32nd of the memory.

#pragma once

#include <cstdint>

#if defined(__AVX__)
#include <immintrin.h>
#endif

// Bit i: v[i] > 0.
template <class A>
inline uint32_t signs(const A* v, int64_t n) {
  uint32_t word = 0;
  for (int64_t i = 0; i < n; i++) word |= uint32_t(v[i] > 0) << i;
  return word;
}

inline uint32_t signs(const double* v) { return signs(v, 32); }

inline uint32_t signs(const float* v) {
#if defined(__AVX512F__)
  const __m512 zero = _mm512_setzero_ps();
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(v), zero, _CMP_GT_OQ) | uint32_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(v + 16), zero, _CMP_GT_OQ)) << 16;
#elif defined(__AVX__)
  uint32_t word = 0;
  for (int i = 0; i < 4; i++) word |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(v + 8 * i), _mm256_setzero_ps(), _CMP_GT_OQ))) << 8 * i;
  return word;
#else
  return signs(v, 32);
#endif
}

// The signs of v[0 .. n - 1] as whole words.
template <class A>
inline void pack_signs(const A* v, uint32_t* words, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) words[i / 32] = signs(v + i);
  if (i < n) words[i / 32] = signs(v + i, n - i);
}

// f(i, positive) for i = 0 .. n - 1, vectorised.
template <class F>
inline void with_signs(const uint32_t* words, int64_t n, F f) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const uint32_t word = words[i / 32];
#pragma omp simd
    for (int j = 0; j < 32; j++) f(i + j, (word & 1u << j) != 0);
  }
  for (; i < n; i++) f(i, (words[i / 32] >> i % 32 & 1) != 0);
}
