// Fused bias + leaky ReLU on the CPU. A tensor is seen as [outer, C, inner]: NCHW is [B, C, H*W], channels_last and [B, C] are [B*H*W, C, 1].
// Backward goes by a bit an element, whether y > 0, so that it moves a third less than with y. Every sum is cut into pieces that depend on the
// shape alone and added in a fixed order: the same input gives the same bits on any number of threads.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "half.h"
#include "signs.h"
#include "stream.h"

namespace {

constexpr int64_t kTile = 1024;   // elements in the inner loop: whole rows of channels, so that short rows fill vectors too
constexpr int64_t kTask = 16384;  // elements that make it worth waking a thread

// Elements of a tile of whole rows of C channels that are whole words of signs.
inline int64_t tile_size(int64_t C) {
  const int64_t rows = 32 / std::gcd(C, int64_t(32));
  return std::max<int64_t>(1, kTile / (rows * C)) * rows * C;
}

// The bias (null: zeros) of a tile's rows, one after another.
template <class A>
void repeat(const A* bias, int64_t C, A* tile, int64_t L) {
  for (int64_t i = 0; i < L; i += C) {
    if (bias) std::copy(bias, bias + C, tile + i);
    else std::fill(tile + i, tile + i + C, A(0));
  }
}

// s[c] += sum over r of x[r, c]. Short rows are first added up as if they were long ones, to fill vectors.
template <class A>
void sum_rows(const A* x, A* s, int64_t rows, int64_t C, A* scratch) {
  const int64_t fold = std::clamp<int64_t>(64 / C, 1, rows), L = fold * C;
  A* out = fold > 1 ? scratch : s;
  if (fold > 1) std::fill(out, out + L, A(0));
  int64_t r = 0;
  for (; r + 4 * fold <= rows; r += 4 * fold) {
    const A* xr = x + r * C;
#pragma omp simd
    for (int64_t i = 0; i < L; i++) out[i] += (xr[i] + xr[L + i]) + (xr[2 * L + i] + xr[3 * L + i]);
  }
  for (; r + fold <= rows; r += fold)
#pragma omp simd
    for (int64_t i = 0; i < L; i++) out[i] += x[r * C + i];
  if (fold > 1)
    for (int64_t f = 0; f < fold; f++)
      for (int64_t c = 0; c < C; c++) s[c] += out[f * C + c];
  for (; r < rows; r++)
    for (int64_t c = 0; c < C; c++) s[c] += x[r * C + c];
}

// y = lrelu(x + bias): reads x once, writes y once. x and y may be the same. positive takes the signs of y, 32 a word, for channels_last in the
// order of memory, for NCHW each of its outer * C rows in words of its own; null: not wanted.
template <class T>
void forward(const T* x, const acc_t<T>* bias, T* y, uint32_t* positive, int64_t outer, int64_t C, int64_t inner, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t total = outer * C * inner, words = (inner + 31) / 32, L = inner == 1 ? tile_size(C) : kTile;
  const bool past = x != y && total * int64_t(sizeof(T)) >= kStream;
  const Buffer<A> tile(inner == 1 ? L : 0);
  if (inner == 1) repeat(bias, C, tile.data, L);
#pragma omp parallel if (total >= 2 * kTask)
  {
    const Buffer<A> out(L);
    const Buffer<T> rounded(L);
    const auto activate = [&](int64_t t, int64_t n, int64_t word, auto bias_of) {
      A* v = out.data;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const A u = get(x[t + i]) + bias_of(i), w = u * slope;
        v[i] = u > 0 ? u : w;
      }
      if (positive) pack_signs(v, positive + word, n);
      store(y + t, v, rounded.data, n, past);
    };
    if (inner == 1) {
      const A* b = tile.data;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < total; t += L) activate(t, std::min(L, total - t), t / 32, [=](int64_t i) { return b[i]; });
    } else {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < outer * C; r++) {
        const A b = bias[r % C];
        for (int64_t t = 0; t < inner; t += L)
          activate(r * inner + t, std::min(L, inner - t), r * words + t / 32, [=](int64_t) { return b; });
      }
    }
    stream_end();
  }
}

// dx = (g + bias) * (y > 0 ? 1 : slope), db = sum of dx over all but the channel: reads g once, writes dx once. bias may be null (zero), db may be
// null (not wanted); positive as `forward` left it.
template <class T>
void masked(const T* g, const uint32_t* positive, const acc_t<T>* bias, T* dx, acc_t<T>* db, int64_t outer, int64_t C, int64_t inner,
            acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t total = outer * C * inner, words = (inner + 31) / 32, L = inner == 1 ? tile_size(C) : kTile;
  const bool past = total * int64_t(sizeof(T)) >= kStream;
  const Buffer<A> tile(inner == 1 ? L : 0);
  if (inner == 1) repeat(bias, C, tile.data, L);
  const int64_t pieces = inner == 1 ? std::clamp<int64_t>(total / kTask, 1, 128) : outer;
  std::vector<A> part(pieces * C, A(0));
#pragma omp parallel if (total >= 2 * kTask)
  {
    const Buffer<A> out(L), scratch(64);
    const Buffer<T> rounded(L);
    A* d = out.data;
    const auto mask = [&](int64_t t, int64_t n, int64_t word, auto bias_of) {
      with_signs(positive + word, n, [=](int64_t i, bool up) {
        const A v = get(g[t + i]) + bias_of(i), w = v * slope;
        d[i] = up ? v : w;
      });
      store(dx + t, d, rounded.data, n, past);
    };
    if (inner == 1) {
      const A* b = tile.data;
      const int64_t tiles = (total + L - 1) / L;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < pieces; p++)
        for (int64_t t = tiles * p / pieces * L; t < std::min(total, tiles * (p + 1) / pieces * L); t += L) {
          const int64_t n = std::min(L, total - t);
          mask(t, n, t / 32, [=](int64_t i) { return b[i]; });
          // Summed apart, from the cache: stores to the sums between those to dx cost twice the time.
          if (db) sum_rows(d, part.data() + p * C, n / C, C, scratch.data);
        }
    } else {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < outer * C; r++) {
        const A b = bias ? bias[r % C] : A(0);
        A s = 0;
        for (int64_t t = 0; t < inner; t += L) {
          const int64_t n = std::min(L, inner - t);
          mask(r * inner + t, n, r * words + t / 32, [=](int64_t) { return b; });
#pragma omp simd reduction(+ : s)
          for (int64_t i = 0; i < n; i++) s += d[i];
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

#define BIAS_LRELU(NAME, T)                                                                                                                       \
  extern "C" void bias_lrelu_##NAME(const void* x, const void* bias, void* y, void* positive, int64_t outer, int64_t C, int64_t inner,            \
                                    double slope) {                                                                                               \
    forward((const T*)x, (const acc_t<T>*)bias, (T*)y, (uint32_t*)positive, outer, C, inner, acc_t<T>(slope));                                    \
  }                                                                                                                                               \
  extern "C" void bias_lrelu_masked_##NAME(const void* g, const void* positive, const void* bias, void* dx, void* db, int64_t outer, int64_t C,   \
                                           int64_t inner, double slope) {                                                                         \
    masked((const T*)g, (const uint32_t*)positive, (const acc_t<T>*)bias, (T*)dx, (acc_t<T>*)db, outer, C, inner, acc_t<T>(slope));               \
  }

BIAS_LRELU(float32, float)
BIAS_LRELU(float64, double)
BIAS_LRELU(bfloat16, bfloat16)
BIAS_LRELU(float16, float16)
