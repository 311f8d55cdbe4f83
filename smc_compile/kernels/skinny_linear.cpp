// y = x W^T + b for a few rows x and a large weight, read once and as it lies in memory.
//
// A thread takes chunks of CHUNK rows of W, block by block of BLOCK columns. A tile of a block (PANEL rows) stays in the
// first-level cache while all rows of x pass over it, ROWS at a time: ROWS * PANEL sums live in registers. Meanwhile
// the tile after the next is fetched into the second-level cache and the next one into the first, every line once and
// evenly, so that reading the weight and multiplying go on at once. Sums are float32: rounded once, at the end. A narrow
// weight is widened tile by tile, or on the way into the product where few rows meet it. Neither the blocks nor the order
// of a sum depend on the number of rows, so neither does a row's result.
#include "lanes.h"

#include <ATen/native/cpu/utils.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include <omp.h>

constexpr int64_t PANEL = 4, BLOCK = 512, CHUNK = 64 * PANEL;
constexpr int64_t ROWS = LANES >= 16 ? 6 : 3;  // 32 registers of 16 numbers, or 16 of 8
constexpr int64_t GROUP = 36;  // rows of x that pass over a tile before the next one
constexpr int64_t FEW = 4;     // rows of x that stay in cache whole; a narrow weight is widened in registers
constexpr int64_t LINE = 64;   // bytes
constexpr int64_t PAIR = 2 * LANES;

// Two vectors of narrow numbers as float32: those at even places, then those at odd ones. x is laid out alike.
inline void widen_pair(const c10::BFloat16* from, Vec& even, Vec& odd) {
  const Int both = Int::loadu(from);
  even = at::vec::cast<float>(both << Int(16));
  odd = at::vec::cast<float>(both & Int(int32_t(0xffff0000)));
}

// n numbers in the order of ``widen_pair``, as far as they come in pairs of vectors; the rest as it stands.
template <typename T>
inline void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) {
    Vec even, odd;
    widen_pair(from + i, even, odd);
    even.store(to + i), odd.store(to + i + LANES);
  }
  for (; i < n; i++) to[i] = float(from[i]);
}

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

// acc [R, O] += x [R, LANES] w [O, LANES]^T, rows of x being ``stride`` numbers apart and w(o) the vectors of w.
template <int R, int O, typename W>
__attribute__((always_inline)) inline void step(const float* x, int64_t stride, const W& w, Vec (*acc)[O]) {
#ifdef CPU_CAPABILITY_AVX2
  // Sums leave four registers: x stays in three, w passes through the last. Left to itself GCC reads an operand of each
  // product from memory, and loads are what it waits for.
  Vec xv[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) xv[r] = in_register(Vec::loadu(x + r * stride));
#pragma GCC unroll 8
  for (int o = 0; o < O; o++) {
    const Vec wv = in_register(w(o));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r][o] = at::vec::fmadd(xv[r], wv, acc[r][o]);
  }
#else
  Vec wv[O];
#pragma GCC unroll 8
  for (int o = 0; o < O; o++) wv[o] = w(o);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Vec xv = Vec::loadu(x + r * stride);
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) acc[r][o] = at::vec::fmadd(xv, wv[o], acc[r][o]);
  }
#endif
}

// sums [R, O] += x [R, n] w [O, n]^T, fetching LINES lines of the tiles ahead a step. W is float, or narrow.
template <int R, int O, int LINES, typename W, typename T>
inline void multiply(const float* x, const W* w, int64_t w_stride, int64_t n, const Ahead<T>& ahead, float* sums) {
  Vec acc[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) acc[r][o] = Vec(0.f);
  int64_t i = 0;
  float rest[O * PAIR];
  const float* left;  // what is left of w, from column ``from`` on
  int64_t left_stride, from;
  if constexpr (std::is_same_v<W, float>) {
    left = w, left_stride = w_stride, from = 0;
  } else {
    for (; i + PAIR <= n; i += PAIR) {
      Vec even[O], odd[O];
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) widen_pair(w + o * w_stride + i, even[o], odd[o]);
      ahead.template fetch<LINES>(i / LANES);
      step<R, O>(x + i, n, [&](int o) { return even[o]; }, acc);
      ahead.template fetch<LINES>(i / LANES + 1);
      step<R, O>(x + i + LANES, n, [&](int o) { return odd[o]; }, acc);
    }
    if (i < n)
      for (int o = 0; o < O; o++) widen(w + o * w_stride + i, n - i, rest + o * PAIR);
    left = rest, left_stride = PAIR, from = i;
  }
  for (; i + LANES <= n; i += LANES) {
    ahead.template fetch<LINES>(i / LANES);
    step<R, O>(x + i, n, [&](int o) { return Vec::loadu(left + o * left_stride + i - from); }, acc);
  }
  if (i < n)
    for (int o = 0; o < O; o++) {
      const Vec wv = Vec::loadu(left + o * left_stride + i - from, n - i);
      for (int r = 0; r < R; r++) acc[r][o] = at::vec::fmadd(Vec::loadu(x + r * n + i, n - i), wv, acc[r][o]);
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) add_sums<O>(acc[r], sums + r * CHUNK);
}

// ``rows`` is at most what fits in registers.
template <int O, int LINES, int R = 1, typename W, typename... Args>
inline void multiply_rows(int64_t rows, const float* x, const W* w, const Args&... args) {
  constexpr int64_t MOST = std::is_same_v<W, float> ? ROWS : std::min(ROWS, FEW);
  if (rows == R) return multiply<R, O, LINES>(x, w, args...);
  if constexpr (R < MOST) return multiply_rows<O, LINES, R + 1>(rows, x, w, args...);
}

template <int O, typename... Args>
inline void multiply_rows_fetching(int64_t lines, int64_t rows, const Args&... args) {
  switch (lines) {
    case 0: return multiply_rows<O, 0>(rows, args...);
    case 1: return multiply_rows<O, 1>(rows, args...);
    case 2: return multiply_rows<O, 2>(rows, args...);
    default: return multiply_rows<O, 4>(rows, args...);
  }
}

// sums [rows, O] += x [rows, n] tile [O, n]^T
template <int O, typename T>
void multiply_tile(const float* x, int64_t rows, const T* tile, int64_t stride, int64_t n, Ahead<T> ahead, float* wide,
                   float* sums) {
  const bool widened = !std::is_same_v<T, float> && rows > FEW;
  if constexpr (!std::is_same_v<T, float>)
    for (int o = 0; widened && o < O; o++) widen(tile + o * stride, n, wide + o * n);
  const int64_t passes = (rows + ROWS - 1) / ROWS, steps = std::max<int64_t>(1, n / LANES);
  const int64_t columns = (n * int64_t(sizeof(T)) + LINE - 1) / LINE;
  for (int64_t j = 0; j < passes; j++) {
    const int64_t first = j * rows / passes, last = (j + 1) * rows / passes;
    const int64_t left = O < PANEL ? 0 : std::max<int64_t>(0, columns - ahead.column) * PANEL;
    const int64_t even = (left + steps * (passes - j) - 1) / (steps * (passes - j));
    const int64_t lines = even > 2 ? 4 : even;
    const float* some = x + first * n;
    if (widened) multiply_rows_fetching<O>(lines, last - first, some, wide, n, n, ahead, sums + first * CHUNK);
    else multiply_rows_fetching<O>(lines, last - first, some, tile, stride, n, ahead, sums + first * CHUNK);
    ahead.column += steps * lines / PANEL;
  }
}

// float32 numbers that begin with a line of the cache: a vector across two of them takes twice as long to load.
class Numbers {
 public:
  explicit Numbers(int64_t n) : lines_((n + 15) / 16) {}
  float* data() { return lines_.data()->numbers; }

 private:
  struct alignas(LINE) Line {
    float numbers[16];
  };
  std::vector<Line> lines_;
};

// What a thread needs: x by blocks, a widened tile, and the sums of a chunk.
struct Room {
  Numbers x, wide, sums;
};

// Sums of W's rows [from, from + width), O of them at a time: a block of x stays in cache while W passes over it. The last
// of them read nothing further ahead.
template <int O, typename T>
void sum_many(const float* x, const T* w, int64_t rows, int64_t in, int64_t from, int64_t width, Room& room) {
  const int64_t groups = (rows + GROUP - 1) / GROUP;
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
}

// The same for so few rows that all of x stays in cache: W passes by in the order in which it lies.
template <int O, typename T>
void sum_few(const float* x, const T* w, int64_t rows, int64_t in, int64_t from, int64_t width, Room& room) {
  for (int64_t i = 0; i < in; i += BLOCK)
    for (int64_t r = 0, n = std::min(BLOCK, in - i); r < rows; r++)
      std::memcpy(room.x.data() + i * rows + r * n, x + r * in + i, n * sizeof(float));
  const int64_t end = (in + BLOCK - 1) / BLOCK * BLOCK;
  for (int64_t o = 0; o < width; o += O) {
    const T* tile = w + (from + o) * in;
    const auto later = [&](int64_t i) { return tile + i / end * O * in + i % end; };
    for (int64_t i = 0; i < in; i += BLOCK) {
      const Ahead<T> ahead{later(i + BLOCK), later(i + 2 * BLOCK), in, 0};
      multiply_tile<O, T>(room.x.data() + i * rows, rows, tile + i, in, std::min(BLOCK, in - i), ahead,
                          room.wide.data(), room.sums.data() + o);
    }
  }
}

// Columns [from, from + width) of y [rows, out], O of them at a time.
template <int O, typename T>
void chunk(const float* x, const T* w, const T* bias, T* y, int64_t rows, int64_t in, int64_t out, int64_t from,
           int64_t width, Room& room) {
  std::fill_n(room.sums.data(), rows * CHUNK, 0.f);
  if (rows <= FEW) sum_few<O>(x, w, rows, in, from, width, room);
  else sum_many<O>(x, w, rows, in, from, width, room);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t o = 0; o < width; o++)
      y[r * out + from + o] = T(room.sums.data()[r * CHUNK + o] + (bias ? float(bias[from + o]) : 0.f));
}

template <typename T>
void product(const T* x, const T* w, const T* bias, T* y, int64_t rows, int64_t in, int64_t out, int64_t threads) {
  std::vector<float> widened(std::is_same_v<T, float> ? 0 : rows * in);
  const float* xs;
  if constexpr (std::is_same_v<T, float>) {
    xs = x;
  } else {
    for (int64_t r = 0; r < rows; r++) widen(x + r * in, in, widened.data() + r * in);
    xs = widened.data();
  }
  const int64_t panels = out / PANEL;
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t first = me * panels / all * PANEL, last = (me + 1) * panels / all * PANEL;
    Room room{Numbers(rows * (rows <= FEW ? in : BLOCK)), Numbers(PANEL * BLOCK), Numbers(rows * CHUNK)};
    for (int64_t o = first; o < last; o += CHUNK)
      chunk<PANEL, T>(xs, w, bias, y, rows, in, out, o, std::min(CHUNK, last - o), room);
    if (me == all - 1 && last < out) chunk<1, T>(xs, w, bias, y, rows, in, out, last, out - last, room);
  }
}

extern "C" void kernel(const NUMBER* x, const NUMBER* w, const NUMBER* bias, NUMBER* y, int64_t rows, int64_t in,
                       int64_t out, int64_t has_bias, int64_t threads) {
  product<NUMBER>(x, w, has_bias ? bias : nullptr, y, rows, in, out, threads);
}
