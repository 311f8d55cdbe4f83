// y = x W^T + b for a few rows x and a large weight, read once and as it lies in memory.
//
// A thread takes chunks of CHUNK rows of W, block by block of BLOCK columns. A tile of a block (PANEL rows) stays in the
// first-level cache while all rows of x pass over it, ROWS at a time: ROWS * PANEL sums live in registers. Meanwhile
// the tile after the next is fetched into the second-level cache and the next one into the first, every line once and
// evenly, so that reading the weight and multiplying go on at once. A narrow weight is widened tile by tile, and sums
// are float32: rounded once, at the end. Blocks do not depend on the number of rows, so neither does a row's result.
#include "lanes.h"

#include <ATen/native/cpu/utils.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include <omp.h>

constexpr int64_t PANEL = 4, BLOCK = 256, CHUNK = 64 * PANEL;
constexpr int64_t ROWS = LANES >= 16 ? 6 : 2;  // 32 registers of 16 numbers, or 16 of 8
constexpr int64_t GROUP = 36;  // rows of x whose block fits in the first-level cache beside two tiles
constexpr int64_t LINE = 64;   // bytes

// The tiles to fetch, from column ``column`` (in lines) on; they have PANEL rows ``stride`` numbers apart.
template <typename T>
struct Ahead {
  const T *next, *after;
  int64_t stride, column;

  // The lines of step ``step`` of LINES a step: four a step are a column of lines, fewer take turns. Inlined always: GCC
  // takes a function that only prefetches for one without effect, and drops its calls.
  template <int LINES>
  __attribute__((always_inline)) void fetch(int64_t step) const {
    constexpr int TURNS = LINES ? PANEL / LINES : 1;
    const int64_t at = (column + step / TURNS) * (LINE / int64_t(sizeof(T)));
#pragma GCC unroll 4
    for (int i = 0; i < LINES; i++) {
      const int64_t from = (step % TURNS * LINES + i) * stride + at;
      __builtin_prefetch(after + from, 0, 2);
      __builtin_prefetch(next + from, 0, 3);
    }
  }
};

// sums [R, O] += x [R, n] w [O, n]^T, fetching LINES lines of the tiles ahead a step.
template <int R, int O, int LINES, typename T>
inline void multiply(const float* x, const float* w, int64_t w_stride, int64_t n, const Ahead<T>& ahead, float* sums) {
  Vec acc[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) acc[r][o] = Vec(0.f);
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    Vec wv[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) wv[o] = Vec::loadu(w + o * w_stride + i);
    ahead.template fetch<LINES>(i / LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec xv = Vec::loadu(x + r * n + i);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) acc[r][o] = at::vec::fmadd(xv, wv[o], acc[r][o]);
    }
  }
  if (whole < n) {
    Vec wv[O];
    for (int o = 0; o < O; o++) wv[o] = Vec::loadu(w + o * w_stride + whole, n - whole);
    for (int r = 0; r < R; r++) {
      const Vec xv = Vec::loadu(x + r * n + whole, n - whole);
      for (int o = 0; o < O; o++) acc[r][o] = at::vec::fmadd(xv, wv[o], acc[r][o]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) add_sums<O>(acc[r], sums + r * CHUNK);
}

template <int O, int LINES, typename T, typename... Args>
inline void multiply_rows(int64_t rows, const Args&... args) {
  switch (rows) {
    case 1: return multiply<1, O, LINES, T>(args...);
    case 2: return multiply<2, O, LINES, T>(args...);
    case 3: return multiply<3, O, LINES, T>(args...);
    case 4: return multiply<4, O, LINES, T>(args...);
    case 5: return multiply<5, O, LINES, T>(args...);
    case 6: return multiply<6, O, LINES, T>(args...);
  }
}

template <int O, typename T, typename... Args>
inline void multiply_rows_fetching(int64_t lines, int64_t rows, const Args&... args) {
  switch (lines) {
    case 0: return multiply_rows<O, 0, T>(rows, args...);
    case 1: return multiply_rows<O, 1, T>(rows, args...);
    case 2: return multiply_rows<O, 2, T>(rows, args...);
    default: return multiply_rows<O, 4, T>(rows, args...);
  }
}

// A tile [O, n] of the weight in float32 in ``wide``.
template <int O, typename T>
inline void widen(const T* tile, int64_t stride, int64_t n, float* wide) {
  for (int o = 0; o < O; o++) {
    const T* from = tile + o * stride;
    float* to = wide + o * n;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
      const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from + i));
      low.store(to + i), high.store(to + i + LANES);
    }
    for (; i < n; i++) to[i] = float(from[i]);
  }
}

// sums [rows, O] += x [rows, n] tile [O, n]^T
template <int O, typename T>
void multiply_tile(const float* x, int64_t rows, const T* tile, int64_t stride, int64_t n, Ahead<T> ahead, float* wide,
                   float* sums) {
  const float* w;
  if constexpr (std::is_same_v<T, float>) w = tile;
  else widen<O, T>(tile, stride, n, wide), w = wide;
  const int64_t w_stride = std::is_same_v<T, float> ? stride : n;
  const int64_t passes = (rows + ROWS - 1) / ROWS, steps = std::max<int64_t>(1, n / LANES);
  const int64_t columns = (n * int64_t(sizeof(T)) + LINE - 1) / LINE;
  for (int64_t j = 0; j < passes; j++) {
    const int64_t first = j * rows / passes, last = (j + 1) * rows / passes;
    const int64_t left = O < PANEL ? 0 : std::max<int64_t>(0, columns - ahead.column) * PANEL;
    const int64_t even = (left + steps * (passes - j) - 1) / (steps * (passes - j));
    const int64_t lines = even > 2 ? 4 : even;
    multiply_rows_fetching<O, T>(lines, last - first, x + first * n, w, w_stride, n, ahead, sums + first * CHUNK);
    ahead.column += steps * lines / PANEL;
  }
}

// What a thread needs: x by blocks, a widened tile, and the sums of a chunk.
struct Room {
  std::vector<float> x, wide, sums;
};

// Columns [from, from + width) of y [rows, out], O of them at a time; the last of them read nothing further ahead.
template <int O, typename T>
void chunk(const float* x, const T* w, const T* bias, T* y, int64_t rows, int64_t in, int64_t out, int64_t from,
           int64_t width, Room& room) {
  const int64_t groups = (rows + GROUP - 1) / GROUP;
  std::fill(room.sums.begin(), room.sums.end(), 0.f);
  for (int64_t i = 0; i < in; i += BLOCK) {
    const int64_t n = std::min(BLOCK, in - i);
    for (int64_t r = 0; r < rows; r++) std::memcpy(room.x.data() + r * n, x + r * in + i, n * sizeof(float));
    // The tile ``ahead`` of column o: of this block, of the next, or of the next chunk (or whatever is there).
    const auto tile = [&](int64_t o) {
      if (o < width) return w + (from + o) * in + i;
      return i + n < in ? w + (from + o - width) * in + i + n : w + (from + o) * in;
    };
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = g * rows / groups, last = (g + 1) * rows / groups;
      for (int64_t o = 0; o < width; o += O) {
        const T* next = tile(o + O);
        const Ahead<T> ahead{next, g ? next : tile(o + 2 * O), in, 0};
        multiply_tile<O, T>(room.x.data() + first * n, last - first, tile(o), in, n, ahead, room.wide.data(),
                            room.sums.data() + first * CHUNK + o);
      }
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t o = 0; o < width; o++)
      y[r * out + from + o] = T(room.sums[r * CHUNK + o] + (bias ? float(bias[from + o]) : 0.f));
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
    const int64_t first = me * panels / all * PANEL, last = (me + 1) * panels / all * PANEL;
    Room room{std::vector<float>(rows * BLOCK), std::vector<float>(PANEL * BLOCK), std::vector<float>(rows * CHUNK)};
    for (int64_t o = first; o < last; o += CHUNK)
      chunk<PANEL, T>(xs, w, bias, y, rows, in, out, o, std::min(CHUNK, last - o), room);
    if (me == all - 1 && last < out) chunk<1, T>(xs, w, bias, y, rows, in, out, last, out - last, room);
  }
}

extern "C" void kernel(const NUMBER* x, const NUMBER* w, const NUMBER* bias, NUMBER* y, int64_t rows, int64_t in,
                       int64_t out, int64_t has_bias, int64_t threads) {
  product<NUMBER>(x, w, has_bias ? bias : nullptr, y, rows, in, out, threads);
}
