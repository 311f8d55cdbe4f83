// y = x W^T + b for a few rows x and a large weight, read once and as it lies in memory.
//
// A thread takes panels of PANEL rows of W. A block of a panel (PANEL x BLOCK numbers) stays in the first-level cache
// while all rows of x pass over it, ROWS at a time: ROWS * PANEL sums live in registers. Meanwhile the next block is
// fetched, so that reading the weight and multiplying go on at once. A narrow weight is widened block by block, and
// sums are float32: rounded once, at the end.
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/cpu/utils.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <omp.h>

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t PANEL = 4, BLOCK = 1024;
constexpr int64_t ROWS = LANES >= 16 ? 6 : 2;  // 32 registers of 16 numbers, or 16 of 8

// One of the weight's blocks [O, n], and the block after it.
template <typename T>
struct Block {
  const T* now;
  const T* next;  // null after the last
  int64_t stride, n;
};

template <typename T>
void fetch(const T* at) {
  __builtin_prefetch(at, 0, 2);
}

// sums [R, O] += x [R, n] w [O, n]^T. Part j of nr of the next block's lines is fetched on the way: a line a step, of
// another row each time, or two where fewer parts than rows pass. More, and the sums leave the registers.
template <int R, int O, bool TWO, typename T>
inline void multiply(const float* x, int64_t x_stride, const float* w, int64_t w_stride, const Block<T>& block,
                     int64_t j, int64_t nr, float* sums) {
  const T* ahead = block.next ? block.next + j % O * block.stride : block.now;
  const T* further = block.next ? block.next + (j + nr) % O * block.stride : block.now;
  Vec acc[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) acc[r][o] = Vec(0.f);
  const int64_t n = block.n, whole = n / LANES * LANES;
  int64_t i = 0;
  for (; i < whole; i += LANES) {
    Vec wv[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) wv[o] = Vec::loadu(w + o * w_stride + i);
    if constexpr (std::is_same_v<T, float>) fetch(ahead + i);
    if constexpr (std::is_same_v<T, float> && TWO) fetch(further + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec xv = Vec::loadu(x + r * x_stride + i);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) acc[r][o] = at::vec::fmadd(xv, wv[o], acc[r][o]);
    }
  }
  if (i < n) {
    Vec wv[O];
    for (int o = 0; o < O; o++) wv[o] = Vec::loadu(w + o * w_stride + i, n - i);
    for (int r = 0; r < R; r++) {
      const Vec xv = Vec::loadu(x + r * x_stride + i, n - i);
      for (int o = 0; o < O; o++) acc[r][o] = at::vec::fmadd(xv, wv[o], acc[r][o]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++)
      sums[r * O + o] += at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, acc[r][o]);
}

template <int O, bool TWO, typename T>
inline void multiply_rows(int64_t rows, const float* x, int64_t x_stride, const float* w, int64_t w_stride,
                          const Block<T>& block, int64_t j, int64_t nr, float* sums) {
  switch (rows) {
    case 1: return multiply<1, O, TWO, T>(x, x_stride, w, w_stride, block, j, nr, sums);
    case 2: return multiply<2, O, TWO, T>(x, x_stride, w, w_stride, block, j, nr, sums);
    case 3: return multiply<3, O, TWO, T>(x, x_stride, w, w_stride, block, j, nr, sums);
    case 4: return multiply<4, O, TWO, T>(x, x_stride, w, w_stride, block, j, nr, sums);
    case 5: return multiply<5, O, TWO, T>(x, x_stride, w, w_stride, block, j, nr, sums);
    case 6: return multiply<6, O, TWO, T>(x, x_stride, w, w_stride, block, j, nr, sums);
  }
}

// The block in float32 in ``wide`` [O, n], the next one on its way.
template <int O, typename T>
inline void widen(const Block<T>& block, float* wide) {
  for (int o = 0; o < O; o++) {
    const T *from = block.now + o * block.stride, *next = block.next + o * block.stride;
    float* to = wide + o * block.n;
    int64_t i = 0;
    for (; i + 2 * LANES <= block.n; i += 2 * LANES) {
      if (block.next) fetch(next + i);
      const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from + i));
      low.store(to + i), high.store(to + i + LANES);
    }
    for (; i < block.n; i++) to[i] = float(from[i]);
  }
}

// O columns of y [rows, out] from O rows of the weight.
template <int O, typename T>
void panel(const float* x, const T* w, const T* bias, T* y, int64_t rows, int64_t in, int64_t out, const T* next,
           float* wide, float* sums) {
  const int64_t blocks = (in + BLOCK - 1) / BLOCK;
  const int64_t width = ((in + blocks - 1) / blocks + LANES - 1) / LANES * LANES;
  const int64_t nr = (rows + ROWS - 1) / ROWS;
  std::fill(sums, sums + rows * O, 0.f);
  for (int64_t i = 0; i < in; i += width) {
    const Block<T> block{w + i, i + width < in ? w + i + width : next, in, std::min(width, in - i)};
    const float* from;
    if constexpr (std::is_same_v<T, float>) from = block.now;
    else widen<O, T>(block, wide), from = wide;
    const int64_t stride = std::is_same_v<T, float> ? in : block.n;
    for (int64_t j = 0; j < nr; j++) {
      const int64_t first = j * rows / nr, last = (j + 1) * rows / nr;
      const auto part = nr < PANEL ? multiply_rows<O, true, T> : multiply_rows<O, false, T>;
      part(last - first, x + first * in + i, in, from, stride, block, j, nr, sums + first * O);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int o = 0; o < O; o++) y[r * out + o] = T(sums[r * O + o] + (bias ? float(bias[o]) : 0.f));
}

template <typename T>
void product(const T* x, const T* w, const T* bias, T* y, int64_t rows, int64_t in, int64_t out, int64_t threads) {
  std::vector<float> converted;
  const float* xs;
  if constexpr (std::is_same_v<T, float>) xs = x;
  else converted.assign(x, x + rows * in), xs = converted.data();
  const int64_t panels = out / PANEL;
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t first = me * panels / all, last = (me + 1) * panels / all;
    std::vector<float> wide(std::is_same_v<T, float> ? 0 : PANEL * (BLOCK + LANES)), sums(rows * PANEL);
    for (int64_t p = first; p < last; p++) {
      const int64_t o = p * PANEL;
      panel<PANEL, T>(xs, w + o * in, bias ? bias + o : nullptr, y + o, rows, in, out,
                      p + 1 < last ? w + (o + PANEL) * in : nullptr, wide.data(), sums.data());
    }
    if (me == all - 1)
      for (int64_t o = panels * PANEL; o < out; o++)
        panel<1, T>(xs, w + o * in, bias ? bias + o : nullptr, y + o, rows, in, out, nullptr, wide.data(), sums.data());
  }
}

extern "C" void kernel(const NUMBER* x, const NUMBER* w, const NUMBER* bias, NUMBER* y, int64_t rows, int64_t in,
                       int64_t out, int64_t has_bias, int64_t threads) {
  product<NUMBER>(x, w, has_bias ? bias : nullptr, y, rows, in, out, threads);
}
