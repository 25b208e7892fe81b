// Convolutions of channels_last tensors on the CPU, as matrix products of pixels by channels, by Winograd's method where that saves work (Winograd
// 1980; Lavin & Gray 2016). For a kernel of R x R, a tile of M x M output pixels then costs (M + R - 1)^2 multiplications per pair of channels instead
// of M^2 R^2. In Y = A'[(G w G') . (B' x B)]A the product . is elementwise over the (M + R - 1)^2 places of a tile and a matrix product of tiles by
// channels at each place. The gradient with respect to the kernel is the transpose of the same. M = R = 1 is the usual convolution.
//
// At stride 2 a kernel is the sum of four phases: kernels of half the size on the even or odd rows and columns of the input, whose channels stand side
// by side. A transposed convolution has four parities instead: each combination of even or odd output rows and columns has its own half-size kernel.
//
// Transformed data is laid out as [place][channels / L][rows][L], with one row per tile and L elements per vector. Places are an odd number of vectors
// apart: they are written together, and at a power of two they would compete for the same set of the cache.

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include <omp.h>
#if defined(__linux__)
#include <unistd.h>
#endif

#include "vector.h"

namespace {

constexpr int64_t kRows = kVector == 64 ? 8 : 4;  // rows of a matrix product held in registers, two vectors each: half of 32 or of 16 registers
constexpr int64_t kChunk = 16;      // tiles, or channels of kernels, that are transformed together
constexpr int64_t kDeep = 64;       // input channels of large kernels that are processed together
constexpr int64_t kMost = 2048;     // most channels, as many as `zeros` has; conv2d.py knows it too

// A pixel of padding.
template <class T> const T zeros[kMost] = {};

// Bytes that can be expected to stay in the second-level cache: three quarters of it.
const int64_t kCache = [] {
  int64_t size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return std::clamp<int64_t>(size ? size : 1 << 20, 1 << 18, 1 << 21) / 4 * 3;
}();

// Toom and Cook's matrices. A and G evaluate polynomials of M and R coefficients at N - 1 points and at infinity, B interpolates; the denominators are
// in G.
template <int M, int R> struct Toom {
  static constexpr int N = M + R - 1;
  double A[N][M] = {}, G[N][R] = {}, B[N][N] = {};
  constexpr Toom() {
    // Small points and the inverse of one give the least rounding. N - 1 of them are used: all six for M = R = 4.
    const double points[] = {0, 1, -1, 2, -2, 0.5};
    for (int i = 0; i < N; i++) {
      const bool infinity = i == N - 1;
      double scale = 1, power = 1;
      for (int l = 0; l < N - 1; l++)
        if (l != i && !infinity) scale *= points[i] - points[l];
      for (int j = 0; j < std::max(M, R); j++) {
        if (j < M) A[i][j] = infinity ? j == M - 1 : power;
        if (j < R) G[i][j] = infinity ? j == R - 1 : power / scale;
        if (!infinity) power *= points[i];
      }
      B[i][0] = 1;  // the product of all x - points[l], l != i
      for (int l = 0, degree = 0; l < N - 1; l++) {
        if (l == i) continue;
        degree++;
        for (int j = degree; j >= 0; j--) B[i][j] = (j ? B[i][j - 1] : 0) - points[l] * (j < degree ? B[i][j] : 0);
      }
    }
  }
};
template <int M, int R> constexpr Toom<M, R> toom{};

// Loads n vectors, `apart` elements from one to the next, into registers. Without the asm compilers would load them again for every product.
template <int n, class T> inline INLINE void load(V<T>* to, const T* from, int64_t apart) {
  UNROLL for (int i = 0; i < n; i++) {
    to[i] = *(const V<T>*)(from + i * apart);
#if defined(__x86_64__)
    asm("" : "+v"(to[i]));
#endif
  }
}

// out[i * step] = sum_j m(i, j) in[j], for a matrix that is known at compile time.
template <int I, int J, class T, class F> inline INLINE void product(F m, const V<T>* in, V<T>* out, int64_t step) {
  UNROLL for (int i = 0; i < I; i++) {
    V<T> v{};
    UNROLL for (int j = 0; j < J; j++)
      if (m(i, j) != 0) v += in[j] * T(m(i, j));
    out[i * step] = v;
  }
}

// out(i, j, sum_kl m(i, k) in(k, l) m(j, l)), that is m in m': J x J -> I x I.
template <int I, int J, class T, class F, class In, class Out> inline INLINE void both_sides(F m, In in, Out out) {
  V<T> half[I][J], row[I];
  UNROLL for (int j = 0; j < J; j++) {
    V<T> column[J];
    UNROLL for (int i = 0; i < J; i++) column[i] = in(i, j);
    product<I, J, T>(m, column, &half[0][j], J);
  }
  UNROLL for (int i = 0; i < I; i++) {
    product<I, J, T>(m, half[i], row, 1);
    UNROLL for (int j = 0; j < I; j++) out(i, j, row[j]);
  }
}

// c = v u, or c += v u with `more`: n rows and K channels of v, by W vectors of u.
template <class T, int W> void gemm(const T* v, int64_t v_rows, const T* u, T* c, int64_t c_rows, int64_t n, int64_t K, bool more) {
  // As many sums for one vector as for two: they fill the same registers.
  constexpr int rows = W == 1 ? 2 * kRows : kRows;
  for (int64_t r = 0; r < n; r += rows) {
    V<T> sum[rows][W] = {};
    if (more)
      UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int w = 0; w < W; w++) sum[i][w] = *(const V<T>*)(c + (w * c_rows + r + i) * L<T>);
    const T* uk = u;
    for (int64_t k = 0; k < K; k += L<T>) {
      const T* vr = v + (k / L<T> * v_rows + r) * L<T>;
      _Pragma("GCC unroll 2") for (int64_t l = 0; l < L<T>; l++, vr++, uk += W * L<T>) {
        V<T> b[W];
        load<W>(b, uk, L<T>);
        UNROLL for (int i = 0; i < rows; i++)
          UNROLL for (int w = 0; w < W; w++) sum[i][w] += vr[i * L<T>] * b[w];
      }
    }
    UNROLL for (int i = 0; i < rows; i++)
      UNROLL for (int w = 0; w < W; w++) *(V<T>*)(c + (w * c_rows + r + i) * L<T>) = sum[i][w];
  }
}

// u = v' h, or u += v' h with `more`: the sum over n rows of `channels` channels of v by W vectors of h.
template <class T, int W>
void outer(const T* v, int64_t v_rows, const T* h, int64_t h_rows, int64_t n, T* u, int64_t channels, bool more) {
  // Input channels at once, so many that their sums, W vectors each, stay in registers.
  constexpr int wide = kVector < 64 ? 4 : W == 1 && L<T> > 8 ? 16 : 8;
  for (int64_t k = 0; k < channels; k += wide) {
    V<T> sum[wide][W] = {};
    if (more)
      UNROLL for (int i = 0; i < wide; i++)
        UNROLL for (int w = 0; w < W; w++) sum[i][w] = *(const V<T>*)(u + ((k + i) * W + w) * L<T>);
    const T* vk = v + k / L<T> * v_rows * L<T> + k % L<T>;
    for (int64_t t = 0; t < n; t++) {
      V<T> b[W];
      load<W>(b, h + t * L<T>, h_rows * L<T>);
      UNROLL for (int i = 0; i < wide; i++)
        UNROLL for (int w = 0; w < W; w++) sum[i][w] += vk[t * L<T> + i] * b[w];
    }
    UNROLL for (int i = 0; i < wide; i++)
      UNROLL for (int w = 0; w < W; w++) *(V<T>*)(u + ((k + i) * W + w) * L<T>) = sum[i][w];
  }
}

// Rows rounded up to what the matrix products process at a time.
int64_t padded(int64_t rows) { return (rows + 2 * kRows - 1) / (2 * kRows) * 2 * kRows; }

// What conv2d.py passes. kernel: R. in, out: strides in the input and in the output, one of which is 1. QH, QW: output rows and columns per parity.
// offset and taps are for the even and for the odd of the strided rows, and for columns likewise: output row q reads input rows from in * q + offset
// on, and these meet the kernel's rows taps; -1 is no tap. by_*: the kernel's strides; k is the input channel, n the output channel.
struct Shape {
  int64_t kernel, B, H, W, C, OH, OW, N, in, out, QH, QW, by_k, by_n, by_row, by_column, offset[2], taps[2][4];
};

template <class T, int M, int R> struct Convolution : Shape {
  static constexpr int A = M + R - 1, P = A * A;
  int64_t across, down, tiles, K, phases, parities, width, panels, deep, threads;
  bool shared;  // whether all parities of the output read the same input, which is then transformed once

  explicit Convolution(const Shape& s) : Shape(s) {
    across = (QW + M - 1) / M, down = (QH + M - 1) / M, tiles = B * across * down;
    phases = in * in, parities = out * out, K = C * phases;
    // Output channels at once: two vectors, or one where N is an odd number of them.
    width = N % (2 * L<T>) ? L<T> : 2 * L<T>, panels = N / width;
    // It must divide C, or a pass would reach from one phase into the next; kChunk always does.
    deep = C % kDeep ? kChunk : kDeep;
    shared = offset[0] == offset[1];
    threads = omp_get_max_threads();
  }

  // The number of tiles whose transformed inputs and outputs fill half of the cache.
  int64_t fitting(int64_t least) const {
    return std::clamp<int64_t>(kCache / 2 / (P * (K + N) * int64_t(sizeof(T))) / (2 * kRows) * 2 * kRows, least, 8 * kRows);
  }

  // The offset in the kernel of tap i, j of phase p for parity o, or -1 if there is none.
  int64_t tap(int64_t o, int64_t p, int i, int j) const {
    const int64_t q = in > 1 ? p : o, r = taps[q / 2][i], c = taps[q % 2][j];
    return r < 0 || c < 0 ? -1 : r * by_row + c * by_column;
  }
  // Whether u is 0 at a place: at infinity, where only the last tap counts, if there is no last tap.
  bool empty(int64_t o, int64_t p, int64_t a) const {
    const int64_t q = in > 1 ? p : o;
    return (a / A == A - 1 && taps[q / 2][R - 1] < 0) || (a % A == A - 1 && taps[q % 2][R - 1] < 0);
  }

  struct Tile { int64_t b, y, x; };
  Tile tile(int64_t t) const { return {t / (across * down), t / across % down * M, t % across * M}; }

  // m in m' of tiles t0 .. t1; pixel(tile, i, j) is the address of a tile's pixel.
  template <int I, int J, class F, class Pixel>
  void transform(F m, Pixel pixel, int64_t t0, int64_t t1, int64_t channels, T* to, int64_t rows, int64_t apart) const {
    for (int64_t s = t0; s < t1; s += kChunk) {
      const int64_t n = std::min(kChunk, t1 - s);
      const T* at[kChunk][J][J];
      for (int64_t t = 0; t < n; t++) {
        const Tile q = tile(s + t);
        for (int i = 0; i < J; i++)
          for (int j = 0; j < J; j++) at[t][i][j] = pixel(q, i, j);
      }
      for (int64_t c = 0; c < channels; c += L<T>)
        for (int64_t t = 0; t < n; t++) {
          T* place = to + c * rows + (s - t0 + t) * L<T>;
          both_sides<I, J, T>(m, [&](int i, int j) INLINE { return *(const V<T>*)(at[t][i][j] + c); },
                              [&](int i, int j, V<T> v) INLINE { *(V<T>*)(place + (i * A + j) * apart) = v; });
        }
    }
  }
  // B' x B of tiles t0 .. t1, written as rows from `row` on.
  void inputs(const T* x, int64_t t0, int64_t t1, int64_t o, T* v, int64_t rows, int64_t row, int64_t apart) const {
    for (int64_t p = 0; p < phases; p++) {
      const int64_t q = in > 1 ? p : o, dy = offset[q / 2], dx = offset[q % 2];
      const auto pixel = [&](const Tile& t, int i, int j) {
        const int64_t r = in * (t.y + i) + dy, c = in * (t.x + j) + dx;
        return r >= 0 && r < H && c >= 0 && c < W ? x + ((t.b * H + r) * W + c) * C : zeros<T>;
      };
      transform<A, A>([](int i, int j) { return toom<M, R>.B[i][j]; }, pixel, t0, t1, C, v + p * C * rows + row * L<T>, rows, apart);
    }
  }
  // A g A' of the output's gradient. Not for transposed convolutions: conv2d.py writes their kernels' gradient as that of a convolution.
  void gradients(const T* g, int64_t t0, int64_t t1, T* h, int64_t rows, int64_t row, int64_t apart) const {
    const auto pixel = [&](const Tile& t, int i, int j) {
      const int64_t r = t.y + i, c = t.x + j;
      return r < OH && c < OW ? g + ((t.b * OH + r) * OW + c) * N : zeros<T>;
    };
    transform<A, M>([](int i, int j) { return toom<M, R>.A[i][j]; }, pixel, t0, t1, N, h + row * L<T>, rows, apart);
  }

  // y = A' m A + bias of tiles t0 .. t1 and n channels from n0 on, stored PAST the cache or not. Stored past it, all vectors of a line together.
  template <bool PAST>
  void outputs(const T* m, int64_t rows, int64_t apart, int64_t t0, int64_t t1, int64_t o, int64_t n0, int64_t n, const T* bias, T* y) const {
    for (int64_t t = t0; t < t1; t++) {
      const Tile q = tile(t);
      constexpr int S = PAST ? kLine / kVector : 1;
      for (int64_t c = 0; c < n; c += S * L<T>) {
        V<T> pixels[M][M][S];
        UNROLL for (int s = 0; s < S; s++) {
          const T* from = m + (c + s * L<T>) * rows + (t - t0) * L<T>;
          const V<T> base = bias ? *(const V<T>*)(bias + n0 + c + s * L<T>) : V<T>{};
          both_sides<M, A, T>([](int i, int j) { return toom<M, R>.A[j][i]; },
                              [&](int i, int j) INLINE { return *(const V<T>*)(from + (i * A + j) * apart); },
                              [&](int i, int j, V<T> v) INLINE { pixels[i][j][s] = v + base; });
        }
        for (int i = 0; i < M; i++)
          for (int j = 0; j < M; j++) {
            const int64_t r = out * (q.y + i) + o / 2, l = out * (q.x + j) + o % 2;
            if (r >= OH || l >= OW) continue;
            T* to = y + ((q.b * OH + r) * OW + l) * N + n0 + c;
            for (int s = 0; s < S; s++)
              if (PAST) stream_vector(to + s * L<T>, &pixels[i][j][s]);
              else *(V<T>*)(to + s * L<T>) = pixels[i][j][s];
          }
      }
    }
  }

  // u[place][k][width] = G w G' of input channels k0 .. k1 and output channels n0 .. n0 + width.
  void kernels(const T* w, int64_t o, int64_t k0, int64_t k1, int64_t n0, T* u, int64_t apart) const {
    T piece[R * R][kChunk * 2 * L<T>];
    for (int64_t k = k0; k < k1; k += kChunk) {
      for (int i = 0; i < R * R; i++) {
        const int64_t at = tap(o, k / C, i / R, i % R);
        if (at < 0) std::fill(piece[i], piece[i] + kChunk * width, T(0));
        const T* from = w + at + n0 * by_n + k % C * by_k;
        for (int64_t l = 0; l < kChunk && at >= 0; l++)
          for (int64_t n = 0; n < width; n++) piece[i][l * width + n] = from[n * by_n + l * by_k];
      }
      for (int64_t q = 0; q < kChunk * width; q += L<T>)
        both_sides<A, R, T>([](int i, int j) { return toom<M, R>.G[i][j]; },
                            [&](int i, int j) INLINE { return *(const V<T>*)(piece[i * R + j] + q); },
                            [&](int i, int j, V<T> v) INLINE { *(V<T>*)(u + (i * A + j) * apart + (k - k0) * width + q) = v; });
    }
  }
  // w = G' u G of `channels` input channels from k0 on, where u is the sum of `parts` parts.
  void kernels_back(const T* u, int64_t apart, int64_t parts, int64_t part, int64_t o, int64_t k0, int64_t channels, int64_t n0, T* w) const {
    T piece[R * R][kChunk * 2 * L<T>];
    for (int64_t k = 0; k < channels; k += kChunk) {
      for (int64_t q = 0; q < kChunk * width; q += L<T>)
        both_sides<R, A, T>([](int i, int j) { return toom<M, R>.G[j][i]; },
                            [&](int i, int j) INLINE {
                              const T* from = u + (i * A + j) * apart + k * width + q;
                              V<T> v = *(const V<T>*)from;
                              for (int64_t s = 1; s < parts; s++) v += *(const V<T>*)(from + s * part);
                              return v;
                            },
                            [&](int i, int j, V<T> v) INLINE { *(V<T>*)(piece[i * R + j] + q) = v; });
      for (int i = 0; i < R * R; i++) {
        const int64_t at = tap(o, (k0 + k) / C, i / R, i % R);
        if (at < 0) continue;
        T* to = w + at + n0 * by_n + (k0 + k) % C * by_k;
        if (by_k == 1)
          for (int64_t n = 0; n < width; n++)
            for (int64_t l = 0; l < kChunk; l++) to[n * by_n + l] = piece[i][l * width + n];
        else
          for (int64_t l = 0; l < kChunk; l++)
            for (int64_t n = 0; n < width; n++) to[n * by_n + l * by_k] = piece[i][l * width + n];
      }
    }
  }

  void conv(const T* x, const T* w, const T* bias, T* y) const {
    const bool past = B * OH * OW * N * int64_t(sizeof(T)) >= kStream && on_line(y);
    const auto multiply = width == L<T> ? gemm<T, 1> : gemm<T, 2>;
    const auto write = past ? &Convolution::outputs<true> : &Convolution::outputs<false>;
    const int64_t u_apart = K * width + L<T>, u_panel = P * u_apart, u_all = parities * panels * u_panel;
    // Small: the transformed kernels fit the cache, or are no larger than the transformed inputs.
    if (u_all * int64_t(sizeof(T)) <= std::max<int64_t>(kCache, P * tiles * K * sizeof(T))) {
      // Many tiles and small kernels: transform the kernels once; then each thread takes tiles of its own from input to output.
      const int64_t block = std::min(fitting(2 * kRows), padded((tiles + threads - 1) / threads));
      const int64_t blocks = (tiles + block - 1) / block, v_apart = block * K + L<T>, m_apart = block * N + L<T>;
      Buffer<T> u(u_all), scratch(threads * P * (v_apart + m_apart));
#pragma omp parallel num_threads(threads)
      {
        T *v = scratch.data + omp_get_thread_num() * P * (v_apart + m_apart), *m = v + P * v_apart;
#pragma omp for schedule(static)
        for (int64_t q = 0; q < parities * panels; q++) kernels(w, q / panels, 0, K, q % panels * width, u.data + q * u_panel, u_apart);
#pragma omp for schedule(static)
        for (int64_t q = 0; q < blocks; q++) {
          const int64_t t0 = q * block, t1 = std::min(t0 + block, tiles);
          for (int64_t o = 0; o < parities; o++) {
            if (o == 0 || !shared) inputs(x, t0, t1, o, v, block, 0, v_apart);
            for (int64_t a = 0; a < P; a++)
              for (int64_t n = 0; n < panels; n++) {
                const T* un = u.data + (o * panels + n) * u_panel + a * u_apart;
                T* mn = m + a * m_apart + n * width * block;
                bool more = false;
                for (int64_t p = 0; p < phases; p++)
                  if (!empty(o, p, a)) {
                    multiply(v + a * v_apart + p * C * block, block, un + p * C * width, mn, block, padded(t1 - t0), C, more);
                    more = true;
                  }
                if (!more) std::fill(mn, mn + width * block, T(0));
              }
            (this->*write)(m, block, m_apart, t0, t1, o, 0, N, bias, y);
          }
        }
        stream_end();
      }
      return;
    }
    // Few tiles and large kernels: transform the inputs once; then each thread takes output channels of its own. It goes through a few input channels
    // at a time, so that the kernels that it transforms stay in its cache.
    const int64_t rows = padded(tiles), v_apart = rows * K + L<T>, d_apart = deep * width + L<T>, m_apart = rows * width + L<T>;
    Buffer<T> v(P * v_apart), scratch(threads * P * (d_apart + m_apart));
#pragma omp parallel num_threads(threads)
    {
      T *u = scratch.data + omp_get_thread_num() * P * (d_apart + m_apart), *m = u + P * d_apart;
      for (int64_t o = 0; o < parities; o++) {
        if (o == 0 || !shared) {
#pragma omp barrier
#pragma omp for schedule(static)
          for (int64_t t = 0; t < tiles; t += kChunk) inputs(x, t, std::min(t + kChunk, tiles), o, v.data, rows, t, v_apart);
        }
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < panels; n++) {
          for (int64_t k = 0; k < K; k += deep) {
            kernels(w, o, k, k + deep, n * width, u, d_apart);
            for (int64_t a = 0; a < P; a++)
              if (!empty(o, k / C, a)) multiply(v.data + a * v_apart + k * rows, rows, u + a * d_apart, m + a * m_apart, rows, rows, deep, k > 0);
              else if (k == 0) std::fill(m + a * m_apart, m + a * m_apart + rows * width, T(0));
          }
          (this->*write)(m, rows, m_apart, 0, tiles, o, n * width, width, bias, y);
        }
      }
      stream_end();
    }
  }

  void weight_gradient(const T* x, const T* g, T* dw) const {
    const auto add = width == L<T> ? outer<T, 1> : outer<T, 2>;
    const int64_t u_apart = K * width + L<T>, u_panel = P * u_apart, u_all = panels * u_panel;
    if (u_all * int64_t(sizeof(T)) <= std::max<int64_t>(kCache, P * tiles * (K + N) * sizeof(T) / 2)) {
      // Many tiles and small kernels, as above: each part of the tiles has its own sum, and the sums are added in a fixed order.
      const int64_t block = fitting(4 * kRows), blocks = (tiles + block - 1) / block, v_apart = block * K + L<T>, h_apart = block * N + L<T>, parts = std::min(threads, blocks);
      Buffer<T> u(parts * u_all), scratch(parts * P * (v_apart + h_apart));
#pragma omp parallel for schedule(static) num_threads(parts)
      for (int64_t part = 0; part < parts; part++) {
        T *v = scratch.data + part * P * (v_apart + h_apart), *h = v + P * v_apart, *mine = u.data + part * u_all;
        const int64_t first = blocks * part / parts, end = blocks * (part + 1) / parts;
        for (int64_t q = first; q < end; q++) {
          const int64_t t0 = q * block, t1 = std::min(t0 + block, tiles);
          inputs(x, t0, t1, 0, v, block, 0, v_apart);
          gradients(g, t0, t1, h, block, 0, h_apart);
          for (int64_t a = 0; a < P; a++)
            for (int64_t n = 0; n < panels; n++)
              for (int64_t p = 0; p < phases; p++)
                if (!empty(0, p, a))
                  add(v + a * v_apart + p * C * block, block, h + a * h_apart + n * width * block, block, t1 - t0,
                      mine + n * u_panel + a * u_apart + p * C * width, C, q > first);
        }
      }
#pragma omp parallel for schedule(static) num_threads(threads)
      for (int64_t q = 0; q < panels * (K / kChunk); q++) {
        const int64_t n = q / (K / kChunk), k = q % (K / kChunk) * kChunk;
        kernels_back(u.data + n * u_panel + k * width, u_apart, parts, u_all, 0, k, kChunk, n * width, dw);
      }
      return;
    }
    const int64_t v_apart = tiles * K + L<T>, h_apart = tiles * N + L<T>, apart = deep * width + L<T>;
    Buffer<T> v(P * v_apart), h(P * h_apart), scratch(threads * P * apart);
#pragma omp parallel num_threads(threads)
    {
      T* u = scratch.data + omp_get_thread_num() * P * apart;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tiles; t += kChunk) {
        inputs(x, t, std::min(t + kChunk, tiles), 0, v.data, tiles, t, v_apart);
        gradients(g, t, std::min(t + kChunk, tiles), h.data, tiles, t, h_apart);
      }
#pragma omp for schedule(static)
      for (int64_t q = 0; q < panels * (K / deep); q++) {
        const int64_t n = q / (K / deep), k = q % (K / deep) * deep;
        for (int64_t a = 0; a < P; a++)
          if (!empty(0, k / C, a))
            add(v.data + a * v_apart + k * tiles, tiles, h.data + a * h_apart + n * width * tiles, tiles, tiles, u + a * apart, deep, false);
        kernels_back(u, apart, 1, 0, 0, k, deep, n * width, dw);
      }
    }
  }
};

template <class T, class F> void with_kernel(const int64_t* shape, F run) {
  const Shape& s = *reinterpret_cast<const Shape*>(shape);
  // Taps of a phase: at stride 2, kernels of 3x3 and 4x4 have 2 by 2, those of 7x7 and 8x8 have 4 by 4.
  if (s.kernel == 1) run(Convolution<T, 1, 1>(s));
  if (s.kernel == 2) run(Convolution<T, 4, 2>(s));
  if (s.kernel == 3) run(Convolution<T, 4, 3>(s));
  if (s.kernel == 4) run(Convolution<T, 4, 4>(s));
}

}  // namespace

#define CONV2D(NAME, T)                                                                                                                            \
  extern "C" void conv2d_##NAME(const void* x, const void* w, const void* bias, void* y, const int64_t* shape) {                                   \
    with_kernel<T>(shape, [&](const auto& convolution) { convolution.conv((const T*)x, (const T*)w, (const T*)bias, (T*)y); });                    \
  }                                                                                                                                                \
  extern "C" void conv2d_weight_gradient_##NAME(const void* x, const void* g, void* dw, const int64_t* shape) {                                    \
    with_kernel<T>(shape, [&](const auto& convolution) { convolution.weight_gradient((const T*)x, (const T*)g, (T*)dw); });                        \
  }

CONV2D(float32, float)
CONV2D(float64, double)
