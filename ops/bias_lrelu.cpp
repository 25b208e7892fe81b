// Fused bias + leaky ReLU on the CPU. A tensor is seen as [outer, C, inner]: NCHW is [B, C, H*W], channels_last and [B, C] are [B*H*W, C, 1].
// Every sum is cut into pieces that depend on the shape alone and added in a fixed order: the same input gives the same bits on any number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "half.h"
#include "stream.h"

namespace {

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
    for (int64_t i = 0; i < L; i++) out[i] += (get(xr[i]) + get(xr[L + i])) + (get(xr[2 * L + i]) + get(xr[3 * L + i]));
  }
  for (; r + fold <= rows; r += fold)
#pragma omp simd
    for (int64_t i = 0; i < L; i++) out[i] += get(x[r * C + i]);
  if (fold > 1)
    for (int64_t f = 0; f < fold; f++)
      for (int64_t c = 0; c < C; c++) s[c] += out[f * C + c];
  for (; r < rows; r++)
    for (int64_t c = 0; c < C; c++) s[c] += get(x[r * C + c]);
}

// y = lrelu(x + bias): reads x once, writes y once. x and y may be the same.
template <class T>
void forward(const T* x, const acc_t<T>* bias, T* y, int64_t outer, int64_t C, int64_t inner, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t total = outer * C * inner;
  const bool past = x != y && total * int64_t(sizeof(T)) >= kStream;
  const std::vector<A> tile = inner == 1 ? repeat(bias, outer, C) : std::vector<A>();  // NCHW: one bias a row
  const int64_t L = inner == 1 ? tile.size() : kTile;
#pragma omp parallel if (total >= 2 * kTask)
  {
    std::vector<T> buffer(past ? L : 0);
    if (inner == 1) {
      const A* b = tile.data();
#pragma omp for schedule(static)
      for (int64_t t = 0; t < total; t += L) {
        const int64_t n = std::min(L, total - t);
        T* out = past ? buffer.data() : y + t;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const A v = get(x[t + i]) + b[i], w = v * slope;
          put(out[i], v > 0 ? v : w);
        }
        if (past) stream(y + t, out, n * sizeof(T));
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < outer * C; r++) {
        const A b = bias[r % C];
        for (int64_t t = r * inner; t < (r + 1) * inner; t += L) {
          const int64_t n = std::min(L, (r + 1) * inner - t);
          T* out = past ? buffer.data() : y + t;
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const A v = get(x[t + i]) + b, w = v * slope;
            put(out[i], v > 0 ? v : w);
          }
          if (past) stream(y + t, out, n * sizeof(T));
        }
      }
    }
    stream_end();
  }
}

// dx = (g + bias) * (y > 0 ? 1 : slope), db = sum of dx over all but the channel: reads g and y once, writes dx once.
// bias may be null (zero), db may be null (not wanted).
template <class T>
void masked(const T* g, const T* y, const acc_t<T>* bias, T* dx, acc_t<T>* db, int64_t outer, int64_t C, int64_t inner, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t total = outer * C * inner;
  const bool past = total * int64_t(sizeof(T)) >= kStream;
  const std::vector<A> tile = inner == 1 ? repeat(bias, outer, C) : std::vector<A>();  // NCHW: one bias a row
  const int64_t L = inner == 1 ? tile.size() : kTile;
  const int64_t pieces = inner == 1 ? std::clamp<int64_t>(total / kTask, 1, 128) : outer;
  std::vector<A> part(pieces * C, A(0));
#pragma omp parallel if (total >= 2 * kTask)
  {
    std::vector<T> buffer(past ? L : 0);
    std::vector<A> scratch(64);
    if (inner == 1) {
      const A* b = tile.data();
      const int64_t tiles = (total + L - 1) / L;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < pieces; p++) {
        A* s = part.data() + p * C;
        for (int64_t t = tiles * p / pieces * L; t < std::min(total, tiles * (p + 1) / pieces * L); t += L) {
          const int64_t n = std::min(L, total - t);
          T* out = past ? buffer.data() : dx + t;
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const A v = get(g[t + i]) + b[i], w = v * slope;
            put(out[i], get(y[t + i]) > 0 ? v : w);
          }
          // Summed apart, from the cache: stores to the sums between those to dx cost twice the time.
          if (db) sum_rows(out, s, n / C, C, scratch.data());
          if (past) stream(dx + t, out, n * sizeof(T));
        }
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < outer * C; r++) {
        const A b = bias ? bias[r % C] : A(0);
        A s = 0;
        for (int64_t t = r * inner; t < (r + 1) * inner; t += L) {
          const int64_t n = std::min(L, (r + 1) * inner - t);
          T* out = past ? buffer.data() : dx + t;
#pragma omp simd reduction(+ : s)
          for (int64_t i = 0; i < n; i++) {
            const A v = get(g[t + i]) + b, w = v * slope, d = get(y[t + i]) > 0 ? v : w;
            put(out[i], d);
            s += d;
          }
          if (past) stream(dx + t, out, n * sizeof(T));
        }
        part[r] = s;
      }
    }
    stream_end();
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
BIAS_LRELU(bfloat16, bfloat16)
BIAS_LRELU(float16, float16)
