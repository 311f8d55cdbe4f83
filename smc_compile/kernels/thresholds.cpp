// Where a row is cut: the k-th largest of its scores, or the least probability that top-p keeps. Bisection over the bit
// patterns of the numbers, whose order is theirs: exact after as many passes as a number has bits, over
// ever fewer numbers. Sorting a row of 32,000 takes ten times as long.
#pragma GCC optimize("tree-loop-vectorize")  // Inductor's flags turn it off
#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

using Bits = std::conditional_t<sizeof(NUMBER) == 4, int32_t, int64_t>;
constexpr int STEPS = 8;      // between two looks at which keys are left
constexpr int64_t FEW = 128;  // of so many it does not matter
constexpr Bits LARGEST = std::conditional_t<sizeof(NUMBER) == 4, std::integral_constant<Bits, 0x7fffffff>,
                                            std::integral_constant<Bits, Bits(0x7fffffffffffffffLL)>>::value;

// Keys compare as the numbers do; it is its own inverse.
Bits key(Bits bits) { return bits ^ ((bits >> (8 * sizeof(Bits) - 1)) & LARGEST); }

// A row's keys that may still be the cut, and what the others come to.
template <bool MASS>
struct Row {
  using Sum = std::conditional_t<MASS, NUMBER, Bits>;
  Bits* keys;
  NUMBER* probs;  // of these keys; with MASS alone
  int64_t n;
  Sum rest = 0;

  // Of the whole row: the mass of keys up to t, or how many keys are above it.
  Sum sum(Bits t) const {
    Sum found = 0;
    const int64_t count = n;
    const Bits* const __restrict k = keys;
    if constexpr (MASS) {
      const NUMBER* const __restrict p = probs;
#pragma omp simd reduction(+ : found)
      for (int64_t i = 0; i < count; i++) found += k[i] <= t ? p[i] : NUMBER(0);
    } else {
#pragma omp simd reduction(+ : found)
      for (int64_t i = 0; i < count; i++) found += k[i] > t;
    }
    return rest + found;
  }

  // Keep the keys in (low, high]: what the others add is the same for each t between these.
  void narrow(Bits low, Bits high) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {  // without branches: what they would do is anybody's guess
      const Bits k = keys[i];
      keys[kept] = k;
      if constexpr (MASS) {
        rest += k <= low ? probs[i] : NUMBER(0);
        probs[kept] = probs[i];
      } else {
        rest += k > high;
      }
      kept += (k > low) & (k <= high);
    }
    n = kept;
  }

  // The smallest key t in (low, high] that is not ``below``, asked with sum(t); ``below`` holds up to some key.
  template <typename F>
  Bits bisect(Bits low, Bits high, F below) {
    for (int step = 1; low + 1 < high; step++) {
      const Bits middle = std::midpoint(low, high);
      (below(sum(middle)) ? low : high) = middle;
      if (step % STEPS == 0 && n > FEW) narrow(low, high);
    }
    return high;
  }
};

// The k-th largest: the largest t with at least k scores not below it.
NUMBER kth_largest(Bits* keys, int64_t n, int64_t k) {
  const auto [least, most] = std::minmax_element(keys, keys + n);
  if (*least == *most) return std::bit_cast<NUMBER>(key(*least));
  // The smallest t such that fewer than k scores are above it.
  const Bits low = std::max<Bits>(*least, -LARGEST) - 1, high = *most;
  Row<false> row{keys, nullptr, n};
  return std::bit_cast<NUMBER>(key(row.bisect(low, high, [&](Bits above) { return above >= k; })));
}

// The least probability kept: all that are not above what stands below it hold at most 1 - p of the mass.
NUMBER least_of_mass(NUMBER* probs, Bits* keys, int64_t n, NUMBER rest) {
  const Bits high = *std::max_element(keys, keys + n);
  return std::bit_cast<NUMBER>(Row<true>{keys, probs, n}.bisect(-1, high, [&](NUMBER mass) { return mass <= rest; }));
}

// at [R]: k for scores, or p for probabilities.
extern "C" void kernel(const NUMBER* rows, const NUMBER* at, NUMBER* out, int64_t count, int64_t n, int64_t mass,
                       int64_t threads) {
#pragma omp parallel num_threads(std::min(threads, count))
  {
    std::vector<Bits> keys(n);
    std::vector<NUMBER> probs(mass ? n : 0);
#pragma omp for
    for (int64_t r = 0; r < count; r++) {
      const NUMBER* row = rows + r * n;
      for (int64_t i = 0; i < n; i++) keys[i] = key(std::bit_cast<Bits>(row[i]));
      std::copy(row, row + probs.size(), probs.begin());
      out[r] = mass ? least_of_mass(probs.data(), keys.data(), n, NUMBER(1) - at[r])
                    : kth_largest(keys.data(), n, std::clamp<int64_t>(int64_t(at[r]), 1, n));
    }
  }
}
