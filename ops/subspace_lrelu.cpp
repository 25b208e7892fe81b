// Fused EigenGAN subspace modulation on the CPU: y[b, p] = lrelu(h[b, p] + sum_k coef[b, k] maps[k, p] + bias[c(p)]), p over the C*H*W places of
// a map in memory order. Work is cut along p, so that a piece of the maps (or of their gradient) stays in the first-level cache while the whole
// batch passes by: h is read once, the maps once. Backward goes by a bit an element, whether y > 0, so that it moves a quarter less than with y.
// Every sum is added in an order that depends on the shape alone, not on the number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "half.h"
#include "signs.h"
#include "stream.h"

namespace {

constexpr int64_t kPiece = 512;   // places in a piece, and elements from one buffered row to the next
constexpr int64_t kTask = 16384;  // elements that make it worth waking a thread
constexpr int64_t kMaps = 7;      // maps in one go
constexpr int64_t kImages = 8;    // images in one go, where their gradients are summed

// out[m] = in[m] + sum over j of c[m][j] x[j] for M rows out of N rows x, all buffered; `in_step` 0: the same for all m.
// c is c_step elements apart from one m to the next. finish(m, i, v) is what is stored.
template <int M, int N, class A, class F>
inline void combine(A* out, const A* in, int64_t in_step, const A* c, int64_t c_step, const A* x, int64_t n, F finish) {
  A w[M][N];  // a copy, so that the compiler knows that no store changes it and keeps it in registers
  for (int m = 0; m < M; m++) std::copy(c + m * c_step, c + m * c_step + N, w[m]);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    A v[M];
    for (int m = 0; m < M; m++) v[m] = in[m * in_step + i];
    for (int j = 0; j < N; j++)
      for (int m = 0; m < M; m++) v[m] += w[m][j] * x[j * kPiece + i];
    for (int m = 0; m < M; m++) out[m * kPiece + i] = finish(m, i, v[m]);
  }
}

// `combine` for a number of rows that is 1 or 2: two at a time halve the loads of x.
template <int N, class A, class F>
inline void combine(int64_t rows, A* out, const A* in, int64_t in_step, const A* c, int64_t c_step, const A* x, int64_t n, F finish) {
  if (rows == 2) combine<2, N>(out, in, in_step, c, c_step, x, n, finish);
  else combine<1, N>(out, in, in_step, c, c_step, x, n, finish);
}

// positive [B, W] takes the signs of y, W words of 32 an image; null: not wanted
template <class T>
void forward(const T* h, const acc_t<T>* coef, const T* maps, const acc_t<T>* bias, T* y, uint32_t* positive, int64_t B, int64_t C, int64_t S,
             int64_t K, bool last, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t P = C * S, W = (P + 31) / 32, groups = std::max<int64_t>(1, (K + kMaps - 1) / kMaps), KK = groups * kMaps;
  const bool past = h != y && B * P * int64_t(sizeof(T)) >= kStream;
  std::vector<A> coefs(B * KK);  // padded with zeros to whole groups, as the maps are below
  for (int64_t b = 0; b < B; b++) std::copy(coef + b * K, coef + (b + 1) * K, coefs.begin() + b * KK);
#pragma omp parallel if (B * P >= 2 * kTask)
  {
    const Buffer<A> buffer((KK + 3) * kPiece);
    const Buffer<T> rounded(kPiece);
    A *m = buffer.data, *base = m + KK * kPiece, *out = base + kPiece;
    std::fill(m, base, A(0));
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; p += kPiece) {
      const int64_t n = std::min(kPiece, P - p);
      int64_t c = last ? p % C : p / S, s = p % S;  // counted along, because a division a place would cost as much as the rest
      for (int64_t i = 0; i < n; i++) {
        base[i] = bias[c];
        if (last) c = c + 1 == C ? 0 : c + 1;
        else if (++s == S) s = 0, c++;
      }
      for (int64_t k = 0; k < K; k++)
        for (int64_t i = 0; i < n; i++) m[k * kPiece + i] = get(maps[k * P + p + i]);
      for (int64_t b = 0; b < B; b += 2) {
        const int64_t images = std::min<int64_t>(2, B - b);
        const A *c = coefs.data() + b * KK, *x = m, *in = base;
        int64_t step = 0;
        for (int64_t g = 0; g + 1 < groups; g++, c += kMaps, x += kMaps * kPiece, in = out, step = kPiece)  // only for more maps than go at once
          combine<kMaps>(images, out, in, step, c, KK, x, n, [](int, int64_t, A v) { return v; });
        const T* hb = h + b * P + p;
        combine<kMaps>(images, out, in, step, c, KK, x, n, [=](int j, int64_t i, A v) {
          v += get(hb[j * P + i]);
          const A w = v * slope;
          return v > 0 ? v : w;
        });
        for (int64_t j = 0; j < images; j++) {
          if (positive) pack_signs(out + j * kPiece, positive + (b + j) * W + p / 32, n);
          store(y + (b + j) * P + p, out + j * kPiece, rounded.data, n, past);
        }
      }
    }
    stream_end();
  }
}

// dh = g * (y > 0 ? 1 : slope), dcoef[b, k] = <dh[b], maps[k]>, dmaps[k] = sum_b coef[b, k] dh[b], dbias[c] = sum of dh over all but the channel:
// reads g once. dcoef, dmaps and dbias may be null (not wanted).
template <class T>
void backward(const T* g, const uint32_t* positive, const acc_t<T>* coef, const T* maps, T* dh, acc_t<T>* dcoef, T* dmaps, acc_t<T>* dbias,
              int64_t B, int64_t C, int64_t S, int64_t K, bool last, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t P = C * S, W = (P + 31) / 32, pieces = (P + kPiece - 1) / kPiece;
  std::vector<A> part(dcoef ? pieces * B * K : 0), places(dbias ? P : 0);
  const bool past = B * P * int64_t(sizeof(T)) >= kStream;
  // Row k of sums is dmaps[k], row K, whose weights are ones, what dbias is the sum of.
  const int64_t first = dmaps ? 0 : K, end = dbias ? K + 1 : K, BB = (B + kImages - 1) / kImages * kImages;
  std::vector<A> weights((K + 1) * BB);  // padded with zeros to whole groups of images
  for (int64_t k = 0; k <= K; k++)
    for (int64_t b = 0; b < B; b++) weights[k * BB + b] = k < K ? coef[b * K + k] : A(1);
#pragma omp parallel if (B * P >= 2 * kTask)
  {
    const Buffer<A> buffer((K + 1 + kImages) * kPiece);
    const Buffer<T> rounded(kPiece);
    A *sums = buffer.data, *d = sums + (K + 1) * kPiece;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; p += kPiece) {
      const int64_t n = std::min(kPiece, P - p);
      std::fill(sums, d, A(0));
      for (int64_t b = 0; b < B; b += kImages) {
        const int64_t images = std::min(kImages, B - b);
        for (int64_t j = 0; j < images; j++) {
          const T* gj = g + (b + j) * P + p;
          A* dj = d + j * kPiece;
          with_signs(positive + (b + j) * W + p / 32, n, [=](int64_t i, bool up) {
            const A v = get(gj[i]), w = v * slope;
            dj[i] = up ? v : w;
          });
          store(dh + (b + j) * P + p, dj, rounded.data, n, past);
        }
        std::fill(d + images * kPiece, d + kImages * kPiece, A(0));
        // What was just written is in the first-level cache: the sums read it from there.
        for (int64_t k = first; k < end; k += 2) {
          A* s = sums + k * kPiece;
          combine<kImages>(std::min<int64_t>(2, end - k), s, s, kPiece, weights.data() + k * BB + b, BB, d, n, [](int, int64_t, A v) { return v; });
        }
        if (dcoef)
          for (int64_t j = 0; j < images; j++)
            for (int64_t k = 0; k < K; k++) {
              const A* dj = d + j * kPiece;
              const T* mk = maps + k * P + p;
              A s = 0;
#pragma omp simd reduction(+ : s)
              for (int64_t i = 0; i < n; i++) s += dj[i] * get(mk[i]);
              part[(p / kPiece * B + b + j) * K + k] = s;
            }
      }
      if (dmaps)
        for (int64_t k = 0; k < K; k++)
          for (int64_t i = 0; i < n; i++) put(dmaps[k * P + p + i], sums[k * kPiece + i]);
      if (dbias) std::copy(sums + K * kPiece, sums + K * kPiece + n, places.begin() + p);
    }
    stream_end();
  }
  if (dcoef) {
    std::fill(dcoef, dcoef + B * K, A(0));
    for (int64_t q = 0; q < pieces; q++)
      for (int64_t i = 0; i < B * K; i++) dcoef[i] += part[q * B * K + i];
  }
  if (dbias) {
    std::fill(dbias, dbias + C, A(0));
    if (last)
      for (int64_t s = 0; s < S; s++)
        for (int64_t c = 0; c < C; c++) dbias[c] += places[s * C + c];
    else
      for (int64_t c = 0; c < C; c++)
        for (int64_t s = 0; s < S; s++) dbias[c] += places[c * S + s];
  }
}

}  // namespace

#define SUBSPACE_LRELU(NAME, T)                                                                                                                  \
  extern "C" void subspace_lrelu_##NAME(const void* h, const void* coef, const void* maps, const void* bias, void* y, void* positive, int64_t B, int64_t C,      \
                                        int64_t S, int64_t K, int64_t last, double slope) {                                                      \
    forward((const T*)h, (const acc_t<T>*)coef, (const T*)maps, (const acc_t<T>*)bias, (T*)y, (uint32_t*)positive, B, C, S, K, last, acc_t<T>(slope));                \
  }                                                                                                                                              \
  extern "C" void subspace_lrelu_backward_##NAME(const void* g, const void* positive, const void* coef, const void* maps, void* dh, void* dcoef,        \
                                                 void* dmaps, void* dbias, int64_t B, int64_t C, int64_t S, int64_t K, int64_t last,             \
                                                 double slope) {                                                                                 \
    backward((const T*)g, (const uint32_t*)positive, (const acc_t<T>*)coef, (const T*)maps, (T*)dh, (acc_t<T>*)dcoef, (T*)dmaps, (acc_t<T>*)dbias, B, C, S, K, \
             last, acc_t<T>(slope));                                                                                                             \
  }

SUBSPACE_LRELU(float32, float)
SUBSPACE_LRELU(float64, double)
SUBSPACE_LRELU(bfloat16, bfloat16)
SUBSPACE_LRELU(float16, float16)
