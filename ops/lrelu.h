// Leaky ReLU and its gradient, 32 elements at a time. The gradient needs only the signs of the output: one bit per element, a 32nd of the memory
// that the output takes in float32.

#pragma once

#include <algorithm>
#include <type_traits>

#include "half.h"
#include "vector.h"

constexpr int64_t kWord = 32;  // signs in a word

// n rounded up to whole words.
inline int64_t whole(int64_t n) { return (n + kWord - 1) / kWord * kWord; }

// A word whose bit i tells whether v[i] > 0.
template <class A> inline INLINE uint32_t signs(V<A> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX__)
  if constexpr (std::is_same_v<A, float>) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GT_OQ));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < L<A>; i++) bits |= uint32_t(v[i] > 0) << i;
  return bits;
}

// up[i] where bit i is set, else down[i].
template <class A> inline INLINE V<A> by_sign(uint32_t bits, V<A> up, V<A> down) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return (V<A>)_mm512_mask_blend_ps(__mmask16(bits), (__m512)down, (__m512)up);
#endif
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> I;
  V<I> bit;
  UNROLL for (int i = 0; i < L<A>; i++) bit[i] = I(1) << i;
  return ((V<I>{} + I(bits)) & bit) != 0 ? up : down;
}

// Stores a vector, PAST the cache or not.
template <bool PAST, class A> inline INLINE void put_vector(A* to, V<A> v) {
  if (PAST) stream_vector(to, &v);
  else *(V<A>*)to = v;
}

// y[i] = lrelu(of(i)) for n elements, a multiple of 32; of(i) is the vector at i. words receives the signs of y, unless it is null.
template <bool PAST, class A, class F>
inline INLINE void activate(A* y, uint32_t* words, int64_t n, A slope, F of) {
  for (int64_t i = 0; i < n; i += kWord) {
    uint32_t word = 0;
    UNROLL for (int64_t j = 0; j < kWord; j += L<A>) {
      const V<A> v = of(i + j);
      put_vector<PAST>(y + i + j, v > 0 ? v : v * slope);
      word |= signs<A>(v) << j;
    }
    if (words) words[i / kWord] = word;
  }
}

// out[i] = of(i) * (1 where the sign in words is set, else slope), likewise; each vector v at i is also passed to also(i, v).
template <bool PAST, class A, class F, class G>
inline INLINE void mask(A* out, const uint32_t* words, int64_t n, A slope, F of, G also) {
  for (int64_t i = 0; i < n; i += kWord) {
    const uint32_t word = words[i / kWord];
    UNROLL for (int64_t j = 0; j < kWord; j += L<A>) {
      const V<A> g = of(i + j), v = by_sign<A>(word >> j, g, g * slope);
      put_vector<PAST>(out + i + j, v);
      also(i + j, v);
    }
  }
}

// Whether n elements of type T can be computed where they are. If not, they pass through buffers of the type that is computed in.
template <class T> inline bool in_place(int64_t n) { return std::is_same_v<T, acc_t<T>> && n % kWord == 0; }

// from itself if it can be read where it is; else its n elements, widened into the buffer and padded with zeros to whole words.
template <class T> inline const acc_t<T>* widened(const T* from, acc_t<T>* buffer, int64_t n) {
  if (in_place<T>(n)) return reinterpret_cast<const acc_t<T>*>(from);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) buffer[i] = get(from[i]);
  std::fill(buffer + n, buffer + whole(n), acc_t<T>(0));
  return buffer;
}

// out = v, rounded to T, for n elements. With `past` they are streamed past the cache; then out must start on a cache line, and `rounded` is scratch
// memory for n elements that does too.
template <class T> inline void store(T* out, const acc_t<T>* v, T* rounded, int64_t n, bool past) {
  T* to = past ? rounded : out;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) put(to[i], v[i]);
  if (!past) return;
  int64_t i = 0;
  for (; i + L<T> <= n; i += L<T>) stream_vector(out + i, rounded + i);
  std::copy(rounded + i, rounded + n, out + i);
}
