// Stores that pass the cache by. A usual store first reads the line that it is about to overwrite; for results that no
// cache can hold until they are read, that is a third of the traffic of an elementwise pass.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

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
