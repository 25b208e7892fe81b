// Fused bias + leaky ReLU on the CPU. A tensor is seen as [outer, C, inner]: NCHW is [B, C, H*W], channels_last and [B, C] are [B*H*W, C, 1].
// Every sum is cut into pieces that depend on the shape alone and added in a fixed order: the same input gives the same bits on any number of threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace {

template <class T> using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;
constexpr int64_t kTile = 1024;   // elements in the inner loop: whole rows of channels, so that short rows fill vectors too
constexpr int64_t kTask = 16384;  // elements that make it worth waking a thread

// The bias (null: zeros) of as many rows as make up a tile, one after another.
template <class A>
std::vector<A> repeat(const A* bias, int64_t rows, int64_t C) {
  std::vector<A> tile(std::clamp<int64_t>(kTile / C, 1, rows) * C);
  if (bias)
    for (auto row = tile.begin(); row != tile.end(); row += C) std::copy(bias, bias + C, row);
  return tile;
}

// s[c] += sum over r of x[r, c]. Short rows are first added up as if they were long ones, to fill vectors.
template <class T, class A>
void sum_rows(const T* x, A* s, int64_t rows, int64_t C, A* scratch) {
  const int64_t fold = std::clamp<int64_t>(64 / C, 1, rows), L = fold * C;
  A* out = fold > 1 ? scratch : s;
  if (fold > 1) std::fill(out, out + L, A(0));
  int64_t r = 0;
  for (; r + 4 * fold <= rows; r += 4 * fold) {
    const T* xr = x + r * C;
#pragma omp simd
    for (int64_t i = 0; i < L; i++) out[i] += (A(xr[i]) + A(xr[L + i])) + (A(xr[2 * L + i]) + A(xr[3 * L + i]));
  }
  for (; r + fold <= rows; r += fold)
#pragma omp simd
    for (int64_t i = 0; i < L; i++) out[i] += A(x[r * C + i]);
  if (fold > 1)
    for (int64_t f = 0; f < fold; f++)
      for (int64_t c = 0; c < C; c++) s[c] += out[f * C + c];
  for (; r < rows; r++)
    for (int64_t c = 0; c < C; c++) s[c] += A(x[r * C + c]);
}

// y = lrelu(x + bias): reads x once, writes y once.
template <class T>
void forward(const T* x, const acc_t<T>* bias, T* y, int64_t outer, int64_t C, int64_t inner, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t total = outer * C * inner;
  if (inner == 1) {
    const std::vector<A> tile = repeat(bias, outer, C);
    const A* b = tile.data();
    const int64_t L = tile.size();
#pragma omp parallel for schedule(static) if (total >= 2 * kTask)
    for (int64_t t = 0; t < total; t += L) {
      const int64_t n = std::min(L, total - t);
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const A v = A(x[t + i]) + b[i], w = v * slope;
        y[t + i] = T(v > 0 ? v : w);
      }
    }
  } else {
#pragma omp parallel for schedule(static) if (total >= 2 * kTask)
    for (int64_t r = 0; r < outer * C; r++) {
      const A b = bias[r % C];
      const T* xr = x + r * inner;
      T* yr = y + r * inner;
#pragma omp simd
      for (int64_t i = 0; i < inner; i++) {
        const A v = A(xr[i]) + b, w = v * slope;
        yr[i] = T(v > 0 ? v : w);
      }
    }
  }
}

// dx = (g + bias) * (y > 0 ? 1 : slope), db = sum of dx over all but the channel: reads g and y once, writes dx once.
// bias may be null (zero), db may be null (not wanted).
template <class T>
void masked(const T* g, const T* y, const acc_t<T>* bias, T* dx, acc_t<T>* db, int64_t outer, int64_t C, int64_t inner, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t total = outer * C * inner;
  std::vector<A> part;  // [pieces, C]
  int64_t pieces;
  if (inner == 1) {
    const std::vector<A> tile = repeat(bias, outer, C);
    const A* b = tile.data();
    const int64_t L = tile.size(), tiles = (total + L - 1) / L;
    pieces = std::clamp<int64_t>(total / kTask, 1, 128);
    part.assign(pieces * C, A(0));
#pragma omp parallel for schedule(static) if (total >= 2 * kTask)
    for (int64_t p = 0; p < pieces; p++) {
      A* s = part.data() + p * C;
      std::vector<A> scratch(64);
      for (int64_t t = tiles * p / pieces * L; t < std::min(total, tiles * (p + 1) / pieces * L); t += L) {
        const int64_t n = std::min(L, total - t);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const A v = A(g[t + i]) + b[i], w = v * slope;
          dx[t + i] = T(A(y[t + i]) > 0 ? v : w);
        }
        // Summed apart, from the cache: stores to the sums between those to dx cost twice the time.
        if (db) sum_rows(dx + t, s, n / C, C, scratch.data());
      }
    }
  } else {
    pieces = outer;
    part.resize(outer * C);
#pragma omp parallel for schedule(static) if (total >= 2 * kTask)
    for (int64_t r = 0; r < outer * C; r++) {
      const A b = bias ? bias[r % C] : A(0);
      const T *gr = g + r * inner, *yr = y + r * inner;
      T* dr = dx + r * inner;
      A s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = 0; i < inner; i++) {
        const A v = A(gr[i]) + b, w = v * slope, d = A(yr[i]) > 0 ? v : w;
        dr[i] = T(d);
        s += d;
      }
      part[r] = s;
    }
  }
  if (!db) return;
  std::fill(db, db + C, A(0));
  for (int64_t p = 0; p < pieces; p++)
    for (int64_t c = 0; c < C; c++) db[c] += part[p * C + c];
}

}  // namespace

#define BIAS_LRELU(NAME, T)                                                                                                               \
  extern "C" void bias_lrelu_##NAME(const void* x, const void* bias, void* y, int64_t outer, int64_t C, int64_t inner, double slope) {    \
    forward((const T*)x, (const acc_t<T>*)bias, (T*)y, outer, C, inner, acc_t<T>(slope));                                                 \
  }                                                                                                                                       \
  extern "C" void bias_lrelu_masked_##NAME(const void* g, const void* y, const void* bias, void* dx, void* db, int64_t outer, int64_t C,  \
                                           int64_t inner, double slope) {                                                                 \
    masked((const T*)g, (const T*)y, (const acc_t<T>*)bias, (T*)dx, (acc_t<T>*)db, outer, C, inner, acc_t<T>(slope));                     \
  }

BIAS_LRELU(float32, float)
BIAS_LRELU(float64, double)
BIAS_LRELU(bfloat16, c10::BFloat16)
BIAS_LRELU(float16, c10::Half)
