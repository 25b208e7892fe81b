// Fused EigenGAN subspace modulation on the CPU: y[b, p] = lrelu(h[b, p] + sum_k coef[b, k] maps[k, p] + bias[c(p)]), p over the C*H*W places of
// a map in the order of memory. Work is cut along p: a piece of the maps (or of their gradient) stays in the first-level cache while the whole batch
// passes by, so h and the maps are read once. The backward pass reads one bit per element, whether y > 0, instead of y: a quarter less traffic.
// Sums are added in an order that depends on the shape alone: the same bits on any number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lrelu.h"

namespace {

constexpr int64_t kPiece = 512;   // places in a piece, and the distance of buffered rows: seven float maps are 14 KB of a 32 KB cache
constexpr int64_t kTask = 16384;  // elements per thread; by rule of thumb, fewer are not worth waking one for
constexpr int64_t kMaps = 7;      // maps combined in one loop: the six of a subspace and its origin
constexpr int64_t kImages = 8;    // images whose gradients are summed in one loop

// w[j] = c[j] in every lane.
template <int N, class A>
inline INLINE void spread(const A* c, V<A>* w) {
  UNROLL for (int j = 0; j < N; j++) w[j] = V<A>{} + c[j];
}

// v + sum over j of w[j] x[j], for one vector of N rows of x, at i.
template <int N, class A>
inline INLINE V<A> combined(V<A> v, const V<A>* w, const A* x, int64_t i) {
  UNROLL for (int j = 0; j < N; j++) v += w[j] * *(const V<A>*)(x + j * kPiece + i);
  return v;
}

// out[i] = in[i] + sum over j of c[j] x[j][i] for n elements, a multiple of 32.
template <int N, class A>
inline void combine(A* out, const A* in, const A* c, const A* x, int64_t n) {
  V<A> w[N];
  spread<N>(c, w);
  for (int64_t i = 0; i < n; i += 2 * L<A>) {  // two vectors at a time, since neither has to wait for the other's sum
    const V<A> v = combined<N>(*(const V<A>*)(in + i), w, x, i), u = combined<N>(*(const V<A>*)(in + i + L<A>), w, x, i + L<A>);
    *(V<A>*)(out + i) = v, *(V<A>*)(out + i + L<A>) = u;
  }
}

// Whether to stream a result past the cache: if it is large and its pieces start on cache lines.
template <class T>
bool is_streamed(const T* y, int64_t B, int64_t P) {
  return B * P * int64_t(sizeof(T)) >= kStream && on_line(y) && P * sizeof(T) % kLine == 0;
}

// positive [B, W] receives the signs of y, W words of 32 per image, unless it is null. y may be h.
template <class T>
void forward(const T* h, const acc_t<T>* coef, const T* maps, const acc_t<T>* bias, T* y, uint32_t* positive, int64_t B, int64_t C, int64_t S,
             int64_t K, bool last, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t P = C * S, W = (P + kWord - 1) / kWord, groups = std::max<int64_t>(1, (K + kMaps - 1) / kMaps), KK = groups * kMaps;
  // In place, a line of y has just been read as h, so an ordinary store costs no more traffic.
  const bool past = h != y && is_streamed(y, B, P);
  std::vector<A> coefs(B * KK);  // padded with zeros to whole groups, as the maps are below
  for (int64_t b = 0; b < B; b++) std::copy(coef + b * K, coef + (b + 1) * K, coefs.begin() + b * KK);
#pragma omp parallel if (B * P >= 2 * kTask)
  {
    // The maps, then base, mixed, in and out.
    const Buffer<A> buffer((KK + 4) * kPiece);
    const Buffer<T> rounded(kPiece);
    A *m = buffer.data, *base = m + KK * kPiece, *mixed = base + kPiece, *in = mixed + kPiece, *out = in + kPiece;
    // Zeros stay where a piece is short, and in the maps that fill up a group.
    std::fill(m, out, A(0));
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; p += kPiece) {
      const int64_t n = std::min(kPiece, P - p);
      for (int64_t i = 0, run; i < n; i += run) {  // a run is consecutive channels of a pixel (last), or pixels of one channel
        const int64_t c = last ? (p + i) % C : (p + i) / S;
        run = std::min(n - i, last ? C - c : (c + 1) * S - p - i);
        if (last) std::copy(bias + c, bias + c + run, base + i);
        else std::fill(base + i, base + i + run, bias[c]);
      }
      for (int64_t k = 0; k < K; k++)
        for (int64_t i = 0; i < n; i++) m[k * kPiece + i] = get(maps[k * P + p + i]);
      for (int64_t b = 0; b < B; b++) {
        const A *c = coefs.data() + b * KK, *x = m, *sum = base;
        for (int64_t g = 0; g + 1 < groups; g++, c += kMaps, x += kMaps * kPiece, sum = mixed)  // runs only if there are more than kMaps maps
          combine<kMaps>(mixed, sum, c, x, whole(n));
        V<A> w[kMaps];
        spread<kMaps>(c, w);
        const A* from = widened(h + b * P + p, in, n);
        const auto of = [=](int64_t i) INLINE { return combined<kMaps>(*(const V<A>*)(sum + i) + *(const V<A>*)(from + i), w, x, i); };
        T* to = y + b * P + p;
        uint32_t* words = positive ? positive + b * W + p / kWord : nullptr;
        if (!in_place<T>(n)) {
          activate<false>(out, words, whole(n), slope, of);
          store(to, out, rounded.data, n, past);
        } else if (past) activate<true>((A*)to, words, n, slope, of);
        else activate<false>((A*)to, words, n, slope, of);
      }
    }
    stream_end();
  }
}

// dh = g * (y > 0 ? 1 : slope), dcoef[b, k] = <dh[b], maps[k]>, dmaps[k] = sum_b coef[b, k] dh[b], dbias[c] = sum of dh over all but the channel:
// reads g once. Those of dcoef, dmaps and dbias that are null are not wanted.
template <class T>
void backward(const T* g, const uint32_t* positive, const acc_t<T>* coef, const T* maps, T* dh, acc_t<T>* dcoef, T* dmaps, acc_t<T>* dbias,
              int64_t B, int64_t C, int64_t S, int64_t K, bool last, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t P = C * S, W = (P + kWord - 1) / kWord, pieces = (P + kPiece - 1) / kPiece;
  std::vector<A> part(dcoef ? pieces * B * K : 0), places(dbias ? P : 0);
  const bool past = is_streamed(dh, B, P);
  // Row k of sums becomes dmaps[k]. Row K has ones for weights: its sum over places is dbias.
  const int64_t first = dmaps ? 0 : K, end = dbias ? K + 1 : K, BB = (B + kImages - 1) / kImages * kImages;
  std::vector<A> weights((K + 1) * BB);  // padded with zeros to whole groups of images
  for (int64_t k = 0; k <= K; k++)
    for (int64_t b = 0; b < B; b++) weights[k * BB + b] = k < K ? coef[b * K + k] : A(1);
#pragma omp parallel if (B * P >= 2 * kTask)
  {
    // K + 1 rows of sums, the gradients of kImages images, and a row to widen g in.
    const Buffer<A> buffer((K + 2 + kImages) * kPiece);
    const Buffer<T> rounded(kPiece);
    A *sums = buffer.data, *d = sums + (K + 1) * kPiece, *in = d + kImages * kPiece;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; p += kPiece) {
      const int64_t n = std::min(kPiece, P - p);
      std::fill(sums, d, A(0));
      for (int64_t b = 0; b < B; b += kImages) {
        const int64_t images = std::min(kImages, B - b);
        for (int64_t j = 0; j < images; j++) {
          const A* from = widened(g + (b + j) * P + p, in, n);
          const auto of = [=](int64_t i) INLINE { return *(const V<A>*)(from + i); };
          T* to = dh + (b + j) * P + p;
          A* dj = d + j * kPiece;
          const auto keep = [=](int64_t i, V<A> v) INLINE { *(V<A>*)(dj + i) = v; };
          const uint32_t* words = positive + (b + j) * W + p / kWord;
          if (!in_place<T>(n)) {
            mask<false>(dj, words, whole(n), slope, of, [](int64_t, V<A>) INLINE {});
            store(to, dj, rounded.data, n, past);
          } else if (past) mask<true>((A*)to, words, n, slope, of, keep);
          else mask<false>((A*)to, words, n, slope, of, keep);
        }
        std::fill(d + images * kPiece, d + kImages * kPiece, A(0));
        // The sums come right after, while d is still in the first-level cache.
        for (int64_t k = first; k < end; k++) combine<kImages>(sums + k * kPiece, sums + k * kPiece, weights.data() + k * BB + b, d, whole(n));
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

#define SUBSPACE_LRELU(NAME, T)                                                                                                                   \
  extern "C" void subspace_lrelu_##NAME(const void* h, const void* coef, const void* maps, const void* bias, void* y, void* positive, int64_t B,  \
                                        int64_t C, int64_t S, int64_t K, int64_t last, double slope) {                                            \
    forward((const T*)h, (const acc_t<T>*)coef, (const T*)maps, (const acc_t<T>*)bias, (T*)y, (uint32_t*)positive, B, C, S, K, last,              \
            acc_t<T>(slope));                                                                                                                     \
  }                                                                                                                                               \
  extern "C" void subspace_lrelu_backward_##NAME(const void* g, const void* positive, const void* coef, const void* maps, void* dh, void* dcoef,  \
                                                 void* dmaps, void* dbias, int64_t B, int64_t C, int64_t S, int64_t K, int64_t last,              \
                                                 double slope) {                                                                                  \
    backward((const T*)g, (const uint32_t*)positive, (const acc_t<T>*)coef, (const T*)maps, (T*)dh, (acc_t<T>*)dcoef, (T*)dmaps,                  \
             (acc_t<T>*)dbias, B, C, S, K, last, acc_t<T>(slope));                                                                                \
  }

SUBSPACE_LRELU(float32, float)
SUBSPACE_LRELU(float64, double)
SUBSPACE_LRELU(bfloat16, bfloat16)
SUBSPACE_LRELU(float16, float16)
