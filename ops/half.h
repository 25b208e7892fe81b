// bfloat16 and float16. Their conversions are integer arithmetic without branches, so that the compiler can vectorise the loops around them. `get`
// widens to the type that is computed in; `put` rounds to the nearest value, ties to even, and keeps NaN.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T> using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline float get(const float& x) { return x; }
inline double get(const double& x) { return x; }
inline float get(const bfloat16& x) { return float_of(uint32_t(x.bits) << 16); }

inline float get(const float16& x) {
  constexpr uint32_t rebias = (127 - 15) << 23;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t normal = magnitude + rebias, special = normal + rebias;  // special: infinities and NaN
  const uint32_t small = bits_of(float_of(normal + (1 << 23)) - float_of(rebias + (1 << 23)));  // subnormal: no leading one
  const uint32_t u = magnitude >= 0x7c00u << 13 ? special : magnitude < 0x400u << 13 ? small : normal;
  return float_of(u | (x.bits & 0x8000u) << 16);
}

inline void put(float& x, float f) { x = f; }
inline void put(double& x, double f) { x = f; }

inline void put(bfloat16& x, float f) {
  const uint32_t u = bits_of(f), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  x.bits = f == f ? rounded : 0x7fc0;
}

inline void put(float16& x, float f) {
  constexpr uint32_t rebias = (127 - 15) << 23, half = 126 << 23;  // 0.5: its last bit weighs as much as a subnormal's
  const uint32_t u = bits_of(f), magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - rebias + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - half;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
  const uint32_t r = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? small : normal;
  x.bits = r | (u >> 16 & 0x8000u);
}
