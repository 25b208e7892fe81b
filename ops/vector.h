// Vectors of the processor's own size, in the portable notation of GCC and Clang; buffers whose rows of them start where cache lines do; and stores
// that pass the cache by. A usual store first reads the line that it is about to overwrite; for results that no cache holds until they are read,
// that is a third of the traffic of an elementwise pass.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int64_t kVector = 64;
#elif defined(__AVX__)
constexpr int64_t kVector = 32;
#else
constexpr int64_t kVector = 16;
#endif
constexpr int64_t kLine = 64;         // bytes
constexpr int64_t kStream = 1 << 21;  // bytes of a result from which on it is streamed

template <class T> struct vec { typedef T type __attribute__((vector_size(kVector), aligned(sizeof(T)), may_alias)); };
template <class T> using V = typename vec<T>::type;
template <class T> constexpr int64_t L = kVector / sizeof(T);

#define INLINE __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// n elements, uninitialised. Vectors of a std::vector would lie across two lines each, at up to twice the time.
template <class T> struct Buffer {
  T* data;
  explicit Buffer(int64_t n) : data(static_cast<T*>(std::aligned_alloc(kLine, (n * sizeof(T) + kLine - 1) / kLine * kLine))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

inline bool on_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; }

// One vector of kVector bytes, to an address that is a multiple of them. A line's vectors should follow each other: one that is left half written
// while others follow goes to memory twice.
inline INLINE void stream_vector(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
  _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
#else
  std::memcpy(to, from, kVector);
#endif
}

// Makes them visible to other threads.
inline void stream_end() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}
