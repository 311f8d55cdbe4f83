// Vectors of float32 numbers, as wide as the processor's registers: what the kernels in this folder have in common.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

using Vec = at::vec::Vectorized<float>;
using Int = at::vec::Vectorized<int32_t>;
constexpr int64_t LANES = Vec::size();

inline Vec add(const Vec& a, const Vec& b) { return a + b; }

#ifdef CPU_CAPABILITY_AVX2
// The same numbers, which stay in a register until they are last used.
inline Vec in_register(const Vec& v) {
  __m256 held = v;
  asm("" : "+x"(held));
  return held;
}
#endif

// to [O] += the sums of O vectors.
template <int O>
inline void add_sums(const Vec* acc, float* to) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (O == 4) {
    const __m512 a = acc[0], b = acc[1], c = acc[2], d = acc[3];
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    const __m512 quarters = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
    return;
  }
#endif
#ifdef CPU_CAPABILITY_AVX2
  if constexpr (O == 4) {
    const __m256 pairs = _mm256_hadd_ps(acc[0], acc[1]), others = _mm256_hadd_ps(acc[2], acc[3]);
    const __m256 halves = _mm256_hadd_ps(pairs, others);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
    return;
  }
#endif
#pragma GCC unroll 4
  for (int o = 0; o < O; o++) to[o] += at::vec::vec_reduce_all<float>(add, acc[o]);
}
