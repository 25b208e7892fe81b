// The forces of one iteration of exact t-SNE on the CPU: for every point, sums over all other points of what P and the kernel pull and push.
// Nothing of size [n, n] is written; P is read once, row by row, each thread its own rows. A row is summed in one order, so the result does not
// depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector.h"

namespace {

enum Kernel { kPlane, kSpace, kSpaceScikit };  // as tsne.py numbers them

using F = V<float>;

// 1 / sqrt(x) of positive numbers, to about 2 in the last place: the processor's estimate and one step of Newton's method.
inline INLINE F inverse_root(F x) {
#if defined(__AVX512F__)
  const F r = (F)_mm512_rsqrt14_ps((__m512)x);
#elif defined(__AVX__)
  const F r = (F)_mm256_rsqrt_ps((__m256)x);
#else
  F r;
  UNROLL for (int i = 0; i < L<float>; i++) r[i] = 1 / std::sqrt(x[i]);
  return r;
#endif
  return r * (1.5f - 0.5f * x * r * r);
}

// What is summed for a point i: the kernel, and for both forces the differences y_i - y_j in three coordinates.
struct Sums {
  F kernel{}, attract[3]{}, repel[3]{};

  // Adds the points whose coordinates are y0, y1, y2, and whose P with i is p; where counts is 0, only what a difference of 0 gives.
  template <Kernel K> INLINE void add(F p, const float* x, F y0, F y1, F y2, F counts = F{} + 1.0f) {
    const F d[3] = {x[0] - y0, x[1] - y1, x[2] - y2};
    const F square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
    F w, q;
    if constexpr (K == kPlane) {
      w = q = 1 / (1 + square);
    } else {
      const F root = inverse_root(1 + 0.5f * square);
      w = root * root, q = w * root;
      if constexpr (K == kSpaceScikit) w = q;
    }
    q *= counts;
    kernel += q;
    const F a = p * w, r = q * w;
    UNROLL for (int c = 0; c < 3; c++) attract[c] += a * d[c], repel[c] += r * d[c];
  }
};

float total(F v) {
  float sum = 0;
  for (int i = 0; i < L<float>; i++) sum += v[i];
  return sum;
}

// p [n, n], y [3, n]; attract and repel [3, n]; kernel [n] takes each point's sum over the others.
template <Kernel K> void forces(const float* p, const float* y, float* attract, float* repel, double* kernel, int64_t n) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const float *row = p + i * n, x[3] = {y[i], y[n + i], y[2 * n + i]};
    const auto at = [](const float* from, int64_t j) INLINE { return *(const F*)(from + j); };
    Sums sums;
    const auto others = [&](int64_t from, int64_t to) INLINE {
      for (int64_t j = from; j < to; j += L<float>) sums.add<K>(at(row, j), x, at(y, j), at(y + n, j), at(y + 2 * n, j));
    };
    // A vector of which some places do not count: that of point i itself, and those past the end, which get its coordinates. Its kernel, 1, is left
    // out rather than taken off in the end, for it may be more than all others together.
    const auto some = [&](int64_t from) {
      F part[5] = {F{}, F{} + x[0], F{} + x[1], F{} + x[2], F{}};
      for (int64_t j = 0; j < std::min(L<float>, n - from); j++) {
        part[0][j] = row[from + j], part[4][j] = from + j != i;
        for (int c = 0; c < 3; c++) part[c + 1][j] = y[c * n + from + j];
      }
      sums.add<K>(part[0], x, part[1], part[2], part[3], part[4]);
    };
    const int64_t own = i / L<float> * L<float>, whole = n / L<float> * L<float>;
    others(0, own);
    some(own);
    others(own + L<float>, whole);
    if (whole < n && own < whole) some(whole);
    kernel[i] = total(sums.kernel);
    for (int c = 0; c < 3; c++) attract[c * n + i] = total(sums.attract[c]), repel[c * n + i] = total(sums.repel[c]);
  }
}

}  // namespace

extern "C" void tsne_forces_float32(const void* p, const void* y, void* attract, void* repel, void* kernel, int64_t n, int64_t which) {
  const auto run = which == kPlane ? forces<kPlane> : which == kSpace ? forces<kSpace> : forces<kSpaceScikit>;
  run((const float*)p, (const float*)y, (float*)attract, (float*)repel, (double*)kernel, n);
}
