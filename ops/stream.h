// Memory: buffers whose rows of vectors start where cache lines do, and stores that pass the cache by. A usual store first
// reads the line that it is about to overwrite; for results that no cache holds until they are read, that is a third of
// the traffic of an elementwise pass.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "half.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

constexpr int64_t kStream = 1 << 21;  // bytes of a result from which on it is streamed

#if defined(__AVX512F__)
constexpr int64_t kVector = 64;
#elif defined(__AVX__)
constexpr int64_t kVector = 32;
#else
constexpr int64_t kVector = 16;
#endif

// n elements, uninitialised. Vectors of a std::vector would lie across two lines each, at up to twice the time.
template <class T> struct Buffer {
  T* data;
  explicit Buffer(int64_t n) : data(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

// One vector of kVector bytes, to an address that is a multiple of them.
inline void stream_vector(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
  _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
#else
  std::memcpy(to, from, kVector);
#endif
}

// memcpy with such stores; `stream_end` makes them visible to other threads
inline void stream(void* to, const void* from, int64_t bytes) {
  char* d = static_cast<char*>(to);
  const char* s = static_cast<const char*>(from);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(d) & (kVector - 1));
  std::memcpy(d, s, head);
  for (d += head, s += head, bytes -= head; bytes >= kVector; d += kVector, s += kVector, bytes -= kVector) stream_vector(d, s);
  std::memcpy(d, s, bytes);
}

inline void stream_end() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// out = v, rounded to T; past the cache if so asked. `rounded` is scratch of as many elements.
template <class T>
inline void store(T* out, const acc_t<T>* v, T* rounded, int64_t n, bool past) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (past) stream(out, v, n * sizeof(T));
    else std::memcpy(out, v, n * sizeof(T));
  } else {
    T* to = past ? rounded : out;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) put(to[i], v[i]);
    if (past) stream(out, rounded, n * sizeof(T));
  }
}
