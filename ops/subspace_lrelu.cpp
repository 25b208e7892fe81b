// Fused EigenGAN subspace modulation on the CPU: y[b, p] = lrelu(h[b, p] + sum_k coef[b, k] maps[k, p] + bias[c(p)]), p over the C*H*W places of
// a map in memory order. Work is cut along p, so that a piece of the maps (or of their gradient) stays in the first-level cache while the whole
// batch passes by: h is read once, the maps once. Every sum is added in an order that depends on the shape alone, not on the number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "half.h"
#include "stream.h"

namespace {

constexpr int64_t kPiece = 512;   // places in a piece
constexpr int64_t kTask = 16384;  // elements that make it worth waking a thread

constexpr int64_t kMaps = 7;      // maps in one go
constexpr int64_t kImages = 8;    // images in one go, where their gradients are summed

// sum of N terms c[j] * in[j * stride + i]
template <int N, class A, class X>
inline A dot(const A* c, const X* in, int64_t stride, int64_t i) {
  A v = 0;
  for (int j = 0; j < N; j++) v += c[j] * get(in[j * stride + i]);
  return v;
}

template <class T>
void forward(const T* h, const acc_t<T>* coef, const T* maps, const acc_t<T>* bias, T* y, int64_t B, int64_t C, int64_t S, int64_t K, bool last,
             acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t P = C * S, groups = std::max<int64_t>(1, (K + kMaps - 1) / kMaps), KK = groups * kMaps;
  const bool past = h != y && B * P * int64_t(sizeof(T)) >= kStream;
  std::vector<A> coefs(B * KK);  // padded with zeros to whole groups, as the maps are below
  for (int64_t b = 0; b < B; b++) std::copy(coef + b * K, coef + (b + 1) * K, coefs.begin() + b * KK);
#pragma omp parallel if (B * P >= 2 * kTask)
  {
    std::vector<A> buffer((KK + 2) * kPiece);
    A *m = buffer.data(), *base = m + KK * kPiece, *sum = base + kPiece;
    std::vector<T> row(past ? kPiece : 0);
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
      for (int64_t b = 0; b < B; b++) {
        const T* hb = h + b * P + p;
        const A *cb = coefs.data() + b * KK, *add = base;
        for (int64_t g = 0; g + 1 < groups; g++) {  // only for more maps than go at once
#pragma omp simd
          for (int64_t i = 0; i < n; i++) sum[i] = add[i] + dot<kMaps>(cb, m + g * kMaps * kPiece, kPiece, i);
          add = sum, cb += kMaps;
        }
        const A* mb = m + (groups - 1) * kMaps * kPiece;
        T* out = past ? row.data() : y + b * P + p;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const A v = get(hb[i]) + add[i] + dot<kMaps>(cb, mb, kPiece, i), w = v * slope;
          put(out[i], v > 0 ? v : w);
        }
        if (past) stream(y + b * P + p, out, n * sizeof(T));
      }
    }
    stream_end();
  }
}

// dh = g * (y > 0 ? 1 : slope), dcoef[b, k] = <dh[b], maps[k]>, dmaps[k] = sum_b coef[b, k] dh[b], dbias[c] = sum of dh over all but the channel:
// reads g and y once. dcoef, dmaps and dbias may be null (not wanted).
template <class T>
void backward(const T* g, const T* y, const acc_t<T>* coef, const T* maps, T* dh, acc_t<T>* dcoef, T* dmaps, acc_t<T>* dbias, int64_t B, int64_t C,
              int64_t S, int64_t K, bool last, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t P = C * S, pieces = (P + kPiece - 1) / kPiece;
  const A ones[kImages] = {1, 1, 1, 1, 1, 1, 1, 1};
  std::vector<A> part(dcoef ? pieces * B * K : 0), places(dbias ? P : 0);
  const bool past = B * P * int64_t(sizeof(T)) >= kStream;
  const int64_t apart = past ? kPiece : P;  // elements from one image's piece of d to the next's
  // out[i] += sum over the images of c_j d[j, i]
  const auto add = [&](A* out, const A* c, const T* d, int64_t images, int64_t n) {
    if (images == kImages) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) out[i] += dot<kImages>(c, d, apart, i);
    } else {
      for (int64_t j = 0; j < images; j++)
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] += c[j] * get(d[j * apart + i]);
    }
  };
#pragma omp parallel if (B * P >= 2 * kTask)
  {
    std::vector<A> buffer((K + 1) * kPiece);
    A *dm = buffer.data(), *sum = dm + K * kPiece;
    std::vector<T> rows(past ? kImages * kPiece : 0);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; p += kPiece) {
      const int64_t n = std::min(kPiece, P - p);
      std::fill(buffer.begin(), buffer.end(), A(0));
      for (int64_t b = 0; b < B; b += kImages) {
        const int64_t images = std::min(kImages, B - b);
        T* d = past ? rows.data() : dh + b * P + p;
        for (int64_t j = 0; j < images; j++) {
          const T *gj = g + (b + j) * P + p, *yj = y + (b + j) * P + p;
          T* dj = d + j * apart;
#pragma omp simd
          for (int64_t i = 0; i < n; i++) {
            const A v = get(gj[i]), w = v * slope;
            put(dj[i], get(yj[i]) > 0 ? v : w);
          }
        }
        // What was just written is in the first-level cache: the sums read it from there.
        if (dmaps)
          for (int64_t k = 0; k < K; k++) {
            A c[kImages];
            for (int64_t j = 0; j < images; j++) c[j] = coef[(b + j) * K + k];
            add(dm + k * kPiece, c, d, images, n);
          }
        if (dbias) add(sum, ones, d, images, n);
        if (dcoef)
          for (int64_t j = 0; j < images; j++)
            for (int64_t k = 0; k < K; k++) {
              const T *dj = d + j * apart, *mk = maps + k * P + p;
              A s = 0;
#pragma omp simd reduction(+ : s)
              for (int64_t i = 0; i < n; i++) s += get(dj[i]) * get(mk[i]);
              part[(p / kPiece * B + b + j) * K + k] = s;
            }
        if (past)
          for (int64_t j = 0; j < images; j++) stream(dh + (b + j) * P + p, d + j * kPiece, n * sizeof(T));
      }
      if (dmaps)
        for (int64_t k = 0; k < K; k++)
          for (int64_t i = 0; i < n; i++) put(dmaps[k * P + p + i], dm[k * kPiece + i]);
      if (dbias) std::copy(sum, sum + n, places.begin() + p);
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
  extern "C" void subspace_lrelu_##NAME(const void* h, const void* coef, const void* maps, const void* bias, void* y, int64_t B, int64_t C,      \
                                        int64_t S, int64_t K, int64_t last, double slope) {                                                      \
    forward((const T*)h, (const acc_t<T>*)coef, (const T*)maps, (const acc_t<T>*)bias, (T*)y, B, C, S, K, last, acc_t<T>(slope));                \
  }                                                                                                                                              \
  extern "C" void subspace_lrelu_backward_##NAME(const void* g, const void* y, const void* coef, const void* maps, void* dh, void* dcoef,        \
                                                 void* dmaps, void* dbias, int64_t B, int64_t C, int64_t S, int64_t K, int64_t last,             \
                                                 double slope) {                                                                                 \
    backward((const T*)g, (const T*)y, (const acc_t<T>*)coef, (const T*)maps, (T*)dh, (acc_t<T>*)dcoef, (T*)dmaps, (acc_t<T>*)dbias, B, C, S, K, \
             last, acc_t<T>(slope));                                                                                                             \
  }

SUBSPACE_LRELU(float32, float)
SUBSPACE_LRELU(float64, double)
SUBSPACE_LRELU(bfloat16, bfloat16)
SUBSPACE_LRELU(float16, float16)
