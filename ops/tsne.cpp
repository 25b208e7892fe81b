// Exact t-SNE on the CPU: the forces of one iteration, and the neighbourhoods that P is made of.
//
// Point j moves point i as i moves j, with the other sign. So each pair is computed once, for both points: half the arithmetic, and half of P is never
// read. The pairs are cut into tiles of kBlock x kBlock points. A tile keeps its sums for itself, and what the tiles found is added in one order, so the
// result does not depend on the number of threads. Nothing of size [n, n] is written.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector.h"

namespace {

using F = V<float>;

// The points of a tile's side: 6 sums and 3 coordinates of each, 18 KB, stay in a first-level cache of 32 KB.
constexpr int64_t kBlock = 512;
// Points i at once, for which a vector of points j is loaded and its sums are stored: as many as 32 or 16 registers hold.
constexpr int kRows = kVector == 64 ? 2 : 1;

inline INLINE F load(const float* from) { return *(const F*)from; }
inline INLINE void store(float* to, F v) { *(F*)to = v; }

// 1 / x of positive numbers, to about 2 in the last place: the processor's estimate and one step of Newton's method.
inline INLINE F inverse(F x) {
#if defined(__AVX512F__)
  const F r = (F)_mm512_rcp14_ps((__m512)x);
  return r * (2 - x * r);
#elif defined(__AVX__)
  const F r = (F)_mm256_rcp_ps((__m256)x);
  return r * (2 - x * r);
#else
  return 1 / x;
#endif
}

// 2 / sqrt(x) in the same way. Newton's method gives the double for one multiplication less.
inline INLINE F twice_inverse_root(F x) {
#if defined(__AVX512F__)
  const F r = (F)_mm512_rsqrt14_ps((__m512)x);
  return r * (3 - x * (r * r));
#elif defined(__AVX__)
  const F r = (F)_mm256_rsqrt_ps((__m256)x);
  return r * (3 - x * (r * r));
#else
  F r;
  UNROLL for (int i = 0; i < L<float>; i++) r[i] = 2 / std::sqrt(x[i]);
  return r;
#endif
}

// The sum of a vector, halves first. It stays in registers: a row has one of these for every 5 vectors that it reads.
inline INLINE float total(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float sum = 0;
  for (int i = 0; i < L<float>; i++) sum += v[i];
  return sum;
#endif
}

// P [n, n] and the points [3, padded], scaled so that the kernels are functions of 1 + |d|^2.
struct Cloud {
  const float *p, *y;
  int64_t n, padded;
};

// Adds the pairs of the points i .. i + R - 1 with the points [from, to), which lie in the block that starts at `block`. The sums of the attraction's three
// coordinates and the repulsion's go to mine [6, kBlock] for the points i, and to theirs [6, kBlock] for the others. Returns the sum of the kernel.
template <int D, int R>
float add_rows(const Cloud& cloud, int64_t i, int64_t from, int64_t to, int64_t block, float* mine, float* theirs) {
  const int64_t n = cloud.n;
  const float *rows = cloud.p + i * n, *points[3] = {cloud.y, cloud.y + cloud.padded, cloud.y + 2 * cloud.padded};
  float x[R][3];
  F kernel{}, sums[R][6]{};
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int c = 0; c < 3; c++) x[r][c] = points[c][i + r];
  }

  // A vector of points j. Where counts is 0 nothing is added; p must be 0 there too.
  const auto add = [&](int64_t j, const F* p, const F* counts) INLINE {
    F y[3], others[6];
    UNROLL for (int c = 0; c < 3; c++) y[c] = load(points[c] + j);
    UNROLL for (int c = 0; c < 6; c++) others[c] = load(theirs + c * kBlock + j - block);
    UNROLL for (int r = 0; r < R; r++) {
      const F d[3] = {x[r][0] - y[0], x[r][1] - y[1], x[r][2] - y[2]};
      const F s = d[0] * d[0] + (d[1] * d[1] + (d[2] * d[2] + 1));
      F w, q;
      if constexpr (D == 2) {
        w = q = inverse(s);
      } else {
        const F root = twice_inverse_root(s);
        w = root * root, q = w * root;
      }
      if (counts) q *= *counts;
      kernel += q;
      const F pull = p[r] * w, push = q * w;
      UNROLL for (int c = 0; c < 3; c++) {
        sums[r][c] += pull * d[c], others[c] -= pull * d[c];
        sums[r][c + 3] += push * d[c], others[c + 3] -= push * d[c];
      }
    }
    UNROLL for (int c = 0; c < 6; c++) store(theirs + c * kBlock + j - block, others[c]);
  };
  // A vector that begins before `from` or ends after `to`.
  const auto add_part = [&](int64_t j) {
    F p[R]{}, counts{};
    for (int64_t k = std::max(j, from); k < std::min(j + L<float>, to); k++) {
      counts[k - j] = 1;
      for (int r = 0; r < R; r++) p[r][k - j] = rows[r * n + k];
    }
    add(j, p, &counts);
  };

  int64_t j = from / L<float> * L<float>;
  if (j < from) add_part(j), j += L<float>;
  for (; j + L<float> <= to; j += L<float>) {
    F p[R];
    UNROLL for (int r = 0; r < R; r++) {
      p[r] = load(rows + r * n + j);
      __builtin_prefetch(rows + (R + r) * n + j);  // for the next rows: the processor does not foresee such a jump
    }
    add(j, p, nullptr);
  }
  if (j < to) add_part(j);
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int c = 0; c < 6; c++) mine[c * kBlock + r] += total(sums[r][c]);
  }
  return total(kernel);
}

// The pairs of blocks I <= J of points; each pair once. mine and theirs are the same memory where I is J.
template <int D> double add_tile(const Cloud& cloud, int64_t I, int64_t J, float* mine, float* theirs) {
  const int64_t begin = I * kBlock, end = std::min(cloud.n, begin + kBlock), from = J * kBlock, to = std::min(cloud.n, from + kBlock);
  int64_t i = begin;
  double sum = 0;
  if (I == J) {
    for (; i < end; i++) sum += add_rows<D, 1>(cloud, i, i + 1, to, from, mine + i - begin, theirs);
  }
  for (; i + kRows <= end; i += kRows) sum += add_rows<D, kRows>(cloud, i, from, to, from, mine + i - begin, theirs);
  for (; i < end; i++) sum += add_rows<D, 1>(cloud, i, from, to, from, mine + i - begin, theirs);
  return sum;
}

// p [n, n], y [3, n]; attract and repel [3, n]; kernel [1] takes its sum over all pairs.
template <int D> void forces(const float* p, const float* y, float* attract, float* repel, double* kernel, int64_t n) {
  const int64_t blocks = (n + kBlock - 1) / kBlock, padded = blocks * kBlock, size = 6 * kBlock;
  // In space the kernel has 1 + |d|^2 / 2: points are scaled once, in place of every pair's distance.
  const float scale = D == 2 ? 1 : std::sqrt(0.5f);
  Buffer<float> points(3 * padded), sums(blocks * blocks * size);  // sums [I, J]: of the points of block I, over those of block J
  Buffer<double> kernels(blocks * blocks);
  for (int c = 0; c < 3; c++) {
    for (int64_t i = 0; i < padded; i++) points.data[c * padded + i] = i < n ? scale * y[c * n + i] : 0;
  }
  const Cloud cloud{p, points.data, n, padded};
  // dynamic: tiles on the diagonal have half of the pairs, and those below it none.
#pragma omp parallel for schedule(dynamic)
  for (int64_t tile = 0; tile < blocks * blocks; tile++) {
    const int64_t I = tile / blocks, J = tile % blocks;
    kernels.data[tile] = 0;
    if (I > J) continue;
    float *mine = sums.data + tile * size, *theirs = sums.data + (J * blocks + I) * size;
    std::fill(mine, mine + size, 0.0f);
    std::fill(theirs, theirs + size, 0.0f);
    kernels.data[tile] = add_tile<D>(cloud, I, J, mine, theirs);
  }
  // The roots came out doubled: so w is 4 times too large and q 8 times. And the differences are scaled.
  const float w = D == 2 ? 1 : 4, q = D == 2 ? 1 : 8;
  const float pull = 1 / (w * scale), push = 1 / (q * w * scale);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const float* from = sums.data + i / kBlock * blocks * size + i % kBlock;
    for (int c = 0; c < 3; c++) {
      float a = 0, r = 0;
      for (int64_t J = 0; J < blocks; J++) a += from[J * size + c * kBlock], r += from[J * size + (c + 3) * kBlock];
      attract[c * n + i] = pull * a, repel[c * n + i] = push * r;
    }
  }
  kernel[0] = 0;
  // 2: each pair was computed once, and counts for both of its points.
  for (int64_t tile = 0; tile < blocks * blocks; tile++) kernel[0] += 2 / q * kernels.data[tile];
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------
// Neighbourhoods.

// exp(-x) for x >= 0, to 2 in the last place; at least 2^-126. 2^t is 2^k, written into the exponent's bits, times a polynomial in t - k.
inline INLINE F exp_minus(F x) {
  F t = x * -1.44269504f;  // 1 / ln 2
  t = t > -126.0f ? t : F{} - 126.0f;
  const F shifted = t + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number, which then stands in the lowest bits
  const F f = t - (shifted - 12582912.0f);
  const float c[] = {1.0f, 0.69314718f, 0.24022651f, 0.05550411f, 0.00961813f, 0.00133336f, 0.00015404f, 0.00001525f};  // (ln 2)^i / i!
  F power = F{} + c[7];
  UNROLL for (int i = 6; i >= 0; i--) power = power * f + c[i];
  typedef int32_t Bits __attribute__((vector_size(kVector)));
  return (F)((Bits)power + ((Bits)shifted << 23));
}

// A row of squared distances [n] becomes the shares of the neighbours, sum 1, of the width whose entropy is `target`. scratch [n, rounded up to a vector].
void neighbourhood(float* d, float* scratch, int64_t n, int64_t own, double target) {
  const int64_t padded = (n + L<float> - 1) / L<float> * L<float>;
  float nearest = INFINITY;
  for (int64_t j = 0; j < n; j++) nearest = j == own ? nearest : std::min(nearest, d[j]);
  double mean = 0;
  for (int64_t j = 0; j < n; j++) {
    scratch[j] = j == own ? 0 : d[j] - nearest;
    mean += scratch[j];
  }
  std::fill(scratch + n, scratch + padded, 0.0f);
  // The point itself and the padding count as neighbours at distance 0, exp(-0) = 1 each, and are taken off again.
  const double none = padded - n + 1;
  double log_beta = -std::log(std::max(mean / n, 1e-30)), low = log_beta - 40, high = log_beta + 40;
  float beta = 0;
  double sum = 1;
  for (int iteration = 0; iteration < 60; iteration++) {  // Newton's method on the entropy, kept in brackets by bisection
    beta = std::exp(std::min(log_beta, 80.0));            // ends where all points are one
    F e0{}, e1{}, e2{};
    for (int64_t j = 0; j < padded; j += L<float>) {
      const F x = load(scratch + j), e = exp_minus(beta * x);
      e0 += e, e1 += e * x, e2 += e * x * x;
    }
    sum = total(e0) - none;
    mean = total(e1) / sum;
    const double gap = std::log(sum) + beta * mean - target, variance = total(e2) / sum - mean * mean;
    if (std::abs(gap) < 1e-5) break;
    (gap > 0 ? low : high) = log_beta;
    const double step = log_beta + std::clamp(gap / (double(beta) * beta * variance), -1.0, 1.0);
    log_beta = step > low && step < high ? step : (low + high) / 2;
  }
  const float share = 1 / sum;
  for (int64_t j = 0; j < padded; j += L<float>) store(scratch + j, share * exp_minus(beta * load(scratch + j)));
  std::copy(scratch, scratch + n, d);
  d[own] = 0;
}

}  // namespace

extern "C" void tsne_forces_float32(const void* p, const void* y, void* attract, void* repel, void* kernel, int64_t n, int64_t dims) {
  (dims == 2 ? forces<2> : forces<3>)((const float*)p, (const float*)y, (float*)attract, (float*)repel, (double*)kernel, n);
}

extern "C" void tsne_neighbourhoods_float32(void* d, int64_t rows, int64_t n, int64_t first, double target) {
#pragma omp parallel
  {
    Buffer<float> scratch(n + L<float>);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++) neighbourhood((float*)d + i * n, scratch.data, n, first + i, target);
  }
}
