// Attention of a few new positions over two caches: a prompt that the particles of a request share, and a suffix of
// each particle's own.
//
// A thread takes one head of some particles of a request. Their queries are rows over which a block of keys passes at a
// time, widened to float32 once where it is narrow: a prompt's block over the rows of all of them, a suffix's over those
// of its particle. A row's scores stay in cache until its weights have met the values, which pass by in the same way.
// What a row comes to depends neither on the other rows nor on how they are grouped.
#include "lanes.h"

#include <algorithm>
#include <limits>
#include <vector>

#include <omp.h>

constexpr int64_t BLOCK = 64;                  // keys
constexpr int64_t ROWS = LANES >= 16 ? 6 : 2;  // 32 registers of 16 numbers, or 16 of 8
constexpr int64_t GROUP = 32;                  // queries of one piece of work, unless one particle has more
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

// f(std::integral_constant<int, count>) for a count of 1 to MOST.
template <int MOST, typename F>
inline void counted(int64_t count, const F& f) {
  if constexpr (MOST > 1)
    if (count < MOST) return counted<MOST - 1>(count, f);
  f(std::integral_constant<int, MOST>());
}

// f(first, std::integral_constant<int, size>) over [0, count) in pieces of MOST and what remains.
template <int MOST, typename F>
inline void pieces(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + MOST <= count; i += MOST) f(i, std::integral_constant<int, MOST>());
  if (i < count) counted<MOST>(count - i, [&](auto size) { f(i, size); });
}

// scores [R, O] (rows ``stride`` apart) += q [R, d] k [O, d]^T
template <int R, int O>
inline void dot(const float* q, const float* k, int64_t d, float* scores, int64_t stride) {
  Vec acc[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) acc[r][o] = Vec(0.f);
  for (int64_t i = 0; i < d; i += LANES) {
    Vec kv[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) kv[o] = Vec::loadu(k + o * d + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec qv = Vec::loadu(q + r * d + i);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) acc[r][o] = at::vec::fmadd(qv, kv[o], acc[r][o]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) add_sums<O>(acc[r], scores + r * stride);
}

// out [R, C vectors] (rows ``width`` apart) += weights [R, n] (rows ``stride`` apart) values [n, width]
template <int R, int C>
inline void mix(const float* weights, int64_t stride, const float* values, int64_t n, int64_t width, float* out) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) acc[r][c] = Vec::loadu(out + r * width + c * LANES);
  for (int64_t l = 0; l < n; l++) {
    Vec v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) v[c] = Vec::loadu(values + l * width + c * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec weight(weights[r * stride + l]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) acc[r][c] = at::vec::fmadd(weight, v[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) acc[r][c].store(out + r * width + c * LANES);
}

// LANES numbers of a type, in float32 here and rounded there. (The compiler is told not to make vectors of loops.)
template <typename T>
inline Vec read(const T* from) {
  if constexpr (std::is_same_v<T, float>) return Vec::loadu(from);
  else return std::get<0>(at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, LANES)));
}

template <typename T>
inline void write(const Vec& v, T* to) {
  if constexpr (std::is_same_v<T, float>) v.store(to);
  else at::vec::convert_from_float<T>(v, v).store(to, LANES);
}

// ``count`` numbers in float32: as they lie, or in ``wide``.
template <typename T>
inline const float* widened(const T* from, int64_t count, float* wide) {
  if constexpr (std::is_same_v<T, float>) return from;
  for (int64_t i = 0; i < count; i += LANES) read(from + i).store(wide + i);
  return wide;
}

// A row's scores, ``whole`` vectors with what their mask adds, become exp(score - max); returns their sum.
inline float exponentials(float* row, const float* mask, int64_t whole) {
  Vec most(HIDDEN);
  for (int64_t l = 0; l < whole; l += LANES) {
    const Vec score = Vec::loadu(row + l) + Vec::loadu(mask + l);
    score.store(row + l), most = at::vec::maximum(most, score);
  }
  const Vec top(at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, most));
  Vec sum(0.f);
  for (int64_t l = 0; l < whole; l += LANES) {
    const Vec e = (Vec::loadu(row + l) - top).exp();
    e.store(row + l), sum = sum + e;
  }
  return at::vec::vec_reduce_all<float>(add, sum);
}

// Masks [hidden_rows * T, whole vectors]: 0 where a key is seen, -inf where not and beyond the last.
inline std::vector<float> additive(const bool* hidden, int64_t rows, int64_t keys, int64_t stride) {
  std::vector<float> mask(rows * stride, HIDDEN);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t l = 0; l < keys; l++)
      if (!hidden[r * keys + l]) mask[r * stride + l] = 0.f;
  return mask;
}

struct Sizes {
  int64_t batch, particles, heads, group, tokens, prompt, suffix, width, value_width;
};

// What a thread needs: queries [rows, d], scores [rows, P+S rounded up], sums [rows, dv], a block in float32.
struct Room {
  std::vector<float> queries, scores, out, wide;
};

// scores [rows, n] += queries [rows, d] keys [n, d]^T
template <typename T>
void score(const float* queries, int64_t rows, const T* keys, int64_t n, int64_t d, float* scores, int64_t stride,
           float* wide) {
  for (int64_t from = 0; from < n; from += BLOCK) {
    const int64_t count = std::min(BLOCK, n - from);
    const float* k = widened(keys + from * d, count * d, wide);
    pieces<ROWS>(rows, [&](int64_t r, auto R) {
      pieces<4>(count, [&](int64_t o, auto O) {
        dot<R, O>(queries + r * d, k + o * d, d, scores + r * stride + from + o, stride);
      });
    });
  }
}

// out [rows, dv] += weights [rows, n] values [n, dv]
template <typename T>
void gather(const float* weights, int64_t stride, int64_t rows, const T* values, int64_t n, int64_t dv, float* out,
            float* wide) {
  for (int64_t from = 0; from < n; from += BLOCK) {
    const int64_t count = std::min(BLOCK, n - from);
    const float* v = widened(values + from * dv, count * dv, wide);
    pieces<ROWS>(rows, [&](int64_t r, auto R) {
      pieces<4>(dv / LANES, [&](int64_t c, auto C) {
        mix<R, C>(weights + r * stride + from, stride, v + c * LANES, count, dv, out + r * dv + c * LANES);
      });
    });
  }
}

template <typename T>
void attend(const T* query, const int64_t* strides, const T* prompt_keys, const T* prompt_values, const T* suffix_keys,
            const T* suffix_values, const bool* hidden, int64_t hidden_rows, T* y, const Sizes& z, int64_t threads) {
  const int64_t each = z.group * z.tokens, all = z.prompt + z.suffix, d = z.width, dv = z.value_width;
  const int64_t stride = (all + LANES - 1) / LANES * LANES;
  // Slots that no query of a request sees yet are not read: [hidden_rows] ends of what is seen.
  std::vector<int64_t> ends(hidden_rows, 0);
  for (int64_t i = 0; i < hidden_rows * z.tokens; i++) {
    int64_t end = all;
    while (end > ends[i / z.tokens] && hidden[i * all + end - 1]) end--;
    ends[i / z.tokens] = end;
  }
  const std::vector<float> mask = additive(hidden, hidden_rows * z.tokens, all, stride);
  const int64_t heads = z.batch * z.heads;
  int64_t together = std::max<int64_t>(1, std::min(z.particles, GROUP / each));
  while (together > 1 && heads * ((z.particles + together - 1) / together) < threads) together = (together + 1) / 2;
  const int64_t groups = (z.particles + together - 1) / together;
#pragma omp parallel num_threads(threads)
  {
    const int64_t most = together * each;
    Room room{std::vector<float>(most * d), std::vector<float>(most * stride), std::vector<float>(most * dv),
              std::vector<float>(std::is_same_v<T, float> ? 0 : BLOCK * std::max(d, dv))};
    float *queries = room.queries.data(), *scores = room.scores.data(), *out = room.out.data();
    float* wide = room.wide.data();
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < heads * groups; unit++) {
      const int64_t b = unit / (z.heads * groups), h = unit / groups % z.heads, g = unit % groups;
      const int64_t first = b * z.particles + g * z.particles / groups;
      const int64_t count = b * z.particles + (g + 1) * z.particles / groups - first, rows = count * each;
      const auto hidden_row = [&](int64_t r) { return hidden_rows == 1 ? 0 : hidden_rows == z.batch ? b : r; };
      for (int64_t i = 0; i < rows; i++) {
        const T* from = query + (first + i / each) * strides[0] + h * strides[1] + i % each / z.tokens * strides[2] +
                        i % z.tokens * strides[3];
        for (int64_t j = 0; j < d; j += LANES) read(from + j).store(queries + i * d + j);
      }
      int64_t end = 0;
      for (int64_t r = first; r < first + count; r++) end = std::max(end, ends[hidden_row(r)]);
      const int64_t shared = std::min(end, z.prompt), own = end - shared;
      const int64_t prompt = (b * z.heads + h) * z.prompt;
      std::fill(out, out + rows * dv, 0.f), std::fill(scores, scores + rows * stride, 0.f);
      score(queries, rows, prompt_keys + prompt * d, shared, d, scores, stride, wide);
      for (int64_t i = 0; i < count; i++) {
        const int64_t suffix = ((first + i) * z.heads + h) * z.suffix;
        float* mine = scores + i * each * stride;
        score(queries + i * each * d, each, suffix_keys + suffix * d, own, d, mine + shared, stride, wide);
      }
      std::vector<float> totals(rows);
      for (int64_t i = 0; i < rows; i++) {
        const int64_t row = hidden_row(first + i / each) * z.tokens + i % z.tokens;
        totals[i] = exponentials(scores + i * stride, mask.data() + row * stride, (end + LANES - 1) / LANES * LANES);
      }
      gather(scores, stride, rows, prompt_values + prompt * dv, shared, dv, out, wide);
      for (int64_t i = 0; i < count; i++) {
        const int64_t suffix = ((first + i) * z.heads + h) * z.suffix;
        gather(scores + i * each * stride + shared, stride, each, suffix_values + suffix * dv, own, dv,
               out + i * each * dv, wide);
      }
      for (int64_t i = 0; i < rows; i++) {
        const int64_t r = first + i / each, at = (r * z.tokens + i % z.tokens) * z.heads + h;
        T* to = y + (at * z.group + i % each / z.tokens) * dv;
        const Vec total(totals[i]);
        for (int64_t j = 0; j < dv; j += LANES) write(Vec::loadu(out + i * dv + j) / total, to + j);
      }
    }
  }
}

extern "C" void kernel(const NUMBER* query, const NUMBER* prompt_keys, const NUMBER* prompt_values,
                       const NUMBER* suffix_keys, const NUMBER* suffix_values, const bool* hidden, NUMBER* y,
                       int64_t row_stride, int64_t head_stride, int64_t group_stride, int64_t token_stride,
                       int64_t hidden_rows, int64_t batch, int64_t particles, int64_t heads, int64_t group,
                       int64_t tokens, int64_t prompt, int64_t suffix, int64_t width, int64_t value_width,
                       int64_t threads) {
  const int64_t strides[] = {row_stride, head_stride, group_stride, token_stride};
  const Sizes sizes{batch, particles, heads, group, tokens, prompt, suffix, width, value_width};
  attend<NUMBER>(query, strides, prompt_keys, prompt_values, suffix_keys, suffix_values, hidden, hidden_rows, y, sizes,
                 threads);
}
