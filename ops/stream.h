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

// memcpy with such stores; `stream_end` makes them visible to other threads
inline void stream(void* to, const void* from, int64_t bytes) {
  char* d = static_cast<char*>(to);
  const char* s = static_cast<const char*>(from);
#if defined(__AVX__)
#if defined(__AVX512F__)
  using V = __m512i;
  const auto copy = [](char* d, const char* s) { _mm512_stream_si512((V*)d, _mm512_loadu_si512(s)); };
#else
  using V = __m256i;
  const auto copy = [](char* d, const char* s) { _mm256_stream_si256((V*)d, _mm256_loadu_si256((const V*)s)); };
#endif
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(d) & (sizeof(V) - 1));
  std::memcpy(d, s, head);
  for (d += head, s += head, bytes -= head; bytes >= int64_t(sizeof(V)); d += sizeof(V), s += sizeof(V), bytes -= sizeof(V)) copy(d, s);
#endif
  std::memcpy(d, s, bytes);
}

inline void stream_end() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}
