// Vectors as wide as the processor's registers, in the portable notation of GCC and Clang; buffers that start on cache lines; and streaming stores,
// which bypass the cache. An ordinary store first reads the line that it is about to overwrite. For results that leave the cache before anybody reads
// them that is wasted: a third of the memory traffic of an elementwise pass.

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
constexpr int64_t kLine = 64;         // bytes of a cache line
constexpr int64_t kStream = 1 << 21;  // results of at least this many bytes are streamed: the size of a large second-level cache

template <class T> struct vec { typedef T type __attribute__((vector_size(kVector), aligned(sizeof(T)), may_alias)); };
template <class T> using V = typename vec<T>::type;
template <class T> constexpr int64_t L = kVector / sizeof(T);

#define INLINE __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// Memory for n elements, uninitialised. In a std::vector each vector would lie across two cache lines, which takes up to twice the time.
template <class T> struct Buffer {
  T* data;
  explicit Buffer(int64_t n) : data(static_cast<T*>(std::aligned_alloc(kLine, (n * sizeof(T) + kLine - 1) / kLine * kLine))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

inline bool on_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; }

// Stores one vector past the cache, to an address that is a multiple of kVector bytes. Write the vectors of a line one after the other: a line that is
// left half written goes to memory twice.
inline INLINE void stream_vector(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
  _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
#else
  std::memcpy(to, from, kVector);
#endif
}

// Makes streamed stores visible to other threads: call it before they read.
inline void stream_end() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}
