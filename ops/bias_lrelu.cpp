// Fused bias + leaky ReLU on the CPU. A tensor is seen as [outer, C, inner]: NCHW is [B, C, H*W], channels_last and [B, C] are [B*H*W, C, 1].
// The backward pass reads one bit per element, whether y > 0, instead of y: a third less memory traffic.
// Sums are cut into pieces that depend on the shape alone and are added in a fixed order: the same bits on any number of threads.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "lrelu.h"

namespace {

constexpr int64_t kTile = 1024;   // elements processed together: a tile's buffers fit the first-level cache
constexpr int64_t kTask = 16384;  // elements per thread; by rule of thumb, fewer are not worth waking one for

// Elements of a tile, always whole words of signs. Where inner > 1 it is part of a map; else it is whole rows of C channels, so that rows shorter
// than a vector fill vectors together.
inline int64_t tile_size(int64_t C, int64_t inner) {
  const int64_t rows = inner > 1 ? kTile : kWord / std::gcd(C, kWord) * C;
  return std::max<int64_t>(1, kTile / rows) * rows;
}

// The bias (null: zeros) of a tile's rows, one after another.
template <class A>
void repeat(const A* bias, int64_t C, A* tile, int64_t n) {
  for (int64_t i = 0; i < n; i += C) {
    if (bias) std::copy(bias, bias + C, tile + i);
    else std::fill(tile + i, tile + i + C, A(0));
  }
}

// Whether to stream a result past the cache: if it is too large for a cache and its tiles start on cache lines. The limit is four times that of the
// other ops, because these runs are long and the processor fetches their lines ahead.
template <class T>
bool is_streamed(const T* y, int64_t total, int64_t inner) {
  return total * int64_t(sizeof(T)) >= 4 * kStream && on_line(y) && (inner == 1 || inner * sizeof(T) % kLine == 0);
}

// y = lrelu(x + bias): reads x once, writes y once; y may be x. positive receives the signs of y, 32 per word, unless it is null. For channels_last
// they are in the order of memory; for NCHW each of the outer * C rows starts a new word.
template <class T>
void forward(const T* x, const acc_t<T>* bias, T* y, uint32_t* positive, int64_t outer, int64_t C, int64_t inner, acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t total = outer * C * inner, words = (inner + kWord - 1) / kWord, size = tile_size(C, inner);
  // In place, a line of y has just been read as x, so an ordinary store costs no more traffic.
  const bool past = x != y && is_streamed(y, total, inner);
  const Buffer<A> tile(inner == 1 ? size : 0);
  if (inner == 1) repeat(bias, C, tile.data, size);
#pragma omp parallel if (total >= 2 * kTask)
  {
    const Buffer<A> in(size), out(size);
    const Buffer<T> rounded(size);
    const auto run = [&](int64_t t, int64_t n, int64_t word, auto bias_of) {
      const A* from = widened(x + t, in.data, n);
      const auto of = [=](int64_t i) INLINE { return *(const V<A>*)(from + i) + bias_of(i); };
      uint32_t* to_words = positive ? positive + word : nullptr;
      if (!in_place<T>(n)) {
        activate<false>(out.data, to_words, whole(n), slope, of);
        store(y + t, out.data, rounded.data, n, past);
      } else if (past) activate<true>((A*)(y + t), to_words, n, slope, of);
      else activate<false>((A*)(y + t), to_words, n, slope, of);
    };
    if (inner == 1) {
      const A* b = tile.data;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < total; t += size) run(t, std::min(size, total - t), t / kWord, [=](int64_t i) INLINE { return *(const V<A>*)(b + i); });
    } else {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < outer * C; r++) {
        const V<A> b = V<A>{} + bias[r % C];
        for (int64_t t = 0; t < inner; t += size)
          run(r * inner + t, std::min(size, inner - t), r * words + t / kWord, [=](int64_t) INLINE { return b; });
      }
    }
    stream_end();
  }
}

// dx = (g + bias) * (y > 0 ? 1 : slope), db = sum of dx over all but the channel: reads g once, writes dx once. A null bias is zero, a null db is
// not wanted; positive is what `forward` wrote.
template <class T>
void masked(const T* g, const uint32_t* positive, const acc_t<T>* bias, T* dx, acc_t<T>* db, int64_t outer, int64_t C, int64_t inner,
            acc_t<T> slope) {
  using A = acc_t<T>;
  const int64_t total = outer * C * inner, words = (inner + kWord - 1) / kWord, size = tile_size(C, inner);
  const bool past = is_streamed(dx, total, inner);
  const Buffer<A> tile(inner == 1 ? size : 0);
  if (inner == 1) repeat(bias, C, tile.data, size);
  // Partial sums: one for each image, in channels_last 128 at most. Were there one for each thread, results would
  // depend on the number of threads.
  const int64_t pieces = inner == 1 ? std::clamp<int64_t>(total / kTask, 1, 128) : outer;
  std::vector<A> part(pieces * C, A(0));
#pragma omp parallel if (total >= 2 * kTask)
  {
    // Tiles are added place by place, which keeps vectors full; the places are sorted into channels at the end.
    const Buffer<A> in(size), out(size), sums(size);
    const Buffer<T> rounded(size);
    A* sum = sums.data;
    const auto run = [&](int64_t t, int64_t n, int64_t word, auto bias_of) {
      const A* from = widened(g + t, in.data, n);
      const auto of = [=](int64_t i) INLINE { return *(const V<A>*)(from + i) + bias_of(i); };
      const auto add = [=](int64_t i, V<A> v) INLINE { *(V<A>*)(sum + i) += v; };
      if (!in_place<T>(n)) {
        mask<false>(out.data, positive + word, whole(n), slope, of, [](int64_t, V<A>) INLINE {});
        for (int64_t i = 0; i < n; i++) sum[i] += out.data[i];
        store(dx + t, out.data, rounded.data, n, past);
      } else if (past) mask<true>((A*)(dx + t), positive + word, n, slope, of, add);
      else mask<false>((A*)(dx + t), positive + word, n, slope, of, add);
    };
    if (inner == 1) {
      const A* b = tile.data;
      const int64_t tiles = (total + size - 1) / size;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < pieces; p++) {
        std::fill(sum, sum + size, A(0));
        for (int64_t t = tiles * p / pieces * size; t < std::min(total, tiles * (p + 1) / pieces * size); t += size)
          run(t, std::min(size, total - t), t / kWord, [=](int64_t i) INLINE { return *(const V<A>*)(b + i); });
        for (int64_t i = 0; i < size; i += C)
          for (int64_t c = 0; c < C; c++) part[p * C + c] += sum[i + c];
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < outer * C; r++) {
        const V<A> b = V<A>{} + (bias ? bias[r % C] : A(0));
        const int64_t width = std::min(size, inner);
        std::fill(sum, sum + width, A(0));
        for (int64_t t = 0; t < inner; t += size)
          run(r * inner + t, std::min(size, inner - t), r * words + t / kWord, [=](int64_t) INLINE { return b; });
        A s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = 0; i < width; i++) s += sum[i];
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
