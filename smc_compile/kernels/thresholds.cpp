// Where a row is cut: the k-th largest of its scores, or the least probability that top-p keeps. Bisection over the bit
// patterns of the numbers, whose order is theirs: exact after as many passes over the row as a number has bits, and a
// row stays in the cache meanwhile. Sorting a row of 32,000 takes ten times as long.
#pragma GCC optimize("tree-loop-vectorize")  // Inductor's flags turn it off
#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

using Bits = std::conditional_t<sizeof(NUMBER) == 4, int32_t, int64_t>;
constexpr Bits LARGEST = std::conditional_t<sizeof(NUMBER) == 4, std::integral_constant<Bits, 0x7fffffff>,
                                            std::integral_constant<Bits, Bits(0x7fffffffffffffffLL)>>::value;

// Keys compare as the numbers do; it is its own inverse.
Bits key(Bits bits) { return bits ^ ((bits >> (8 * sizeof(Bits) - 1)) & LARGEST); }

// The smallest key t in (low, high] that is not ``below``; ``below`` holds up to some key and not after it.
template <typename F>
Bits bisect(Bits low, Bits high, F below) {
  while (low + 1 < high) {
    const Bits middle = std::midpoint(low, high);
    (below(middle) ? low : high) = middle;
  }
  return high;
}

// The k-th largest: the largest t with at least k scores not below it.
NUMBER kth_largest(const Bits* keys, int64_t n, int64_t k) {
  const auto [least, most] = std::minmax_element(keys, keys + n);
  if (*least == *most) return std::bit_cast<NUMBER>(key(*least));
  // The smallest t such that fewer than k scores are above it.
  return std::bit_cast<NUMBER>(key(bisect(std::max<Bits>(*least, -LARGEST) - 1, *most, [&](Bits t) {
    Bits above = 0;
#pragma omp simd reduction(+ : above)
    for (int64_t i = 0; i < n; i++) above += keys[i] > t;
    return above >= k;
  })));
}

// The least probability kept: all that are not above what stands below it hold at most 1 - p of the mass.
NUMBER least_of_mass(const NUMBER* probs, const Bits* keys, int64_t n, NUMBER rest) {
  return std::bit_cast<NUMBER>(bisect(-1, *std::max_element(keys, keys + n), [&](Bits t) {
    NUMBER mass = 0;
#pragma omp simd reduction(+ : mass)
    for (int64_t i = 0; i < n; i++) mass += keys[i] <= t ? probs[i] : NUMBER(0);
    return mass <= rest;
  }));
}

// at [R]: k for scores, or p for probabilities.
extern "C" void kernel(const NUMBER* rows, const NUMBER* at, NUMBER* out, int64_t count, int64_t n, int64_t mass,
                       int64_t threads) {
#pragma omp parallel num_threads(std::min(threads, count))
  {
    std::vector<Bits> keys(n);
#pragma omp for
    for (int64_t r = 0; r < count; r++) {
      const NUMBER* row = rows + r * n;
      for (int64_t i = 0; i < n; i++) keys[i] = key(std::bit_cast<Bits>(row[i]));
      out[r] = mass ? least_of_mass(row, keys.data(), n, NUMBER(1) - at[r])
                    : kth_largest(keys.data(), n, std::clamp<int64_t>(int64_t(at[r]), 1, n));
    }
  }
}
