// The two kinds of arithmetic: float32 multiply-adds, and dot products of bfloat16 pairs where the CPU has them.
//
// A kind says in which format the rows of features are kept (Element), how many of them one vector holds (width), and
// how many of them one 32-bit lane holds (pack).
#pragma once
#include "vector.hpp"

namespace moesaic::MOESAIC_VARIANT {

struct FloatKind {
  typedef F32 Format;
  typedef float Element;
  typedef F Vector;
  static constexpr int width = W, pack = 1;
  INLINE Vector load(const float* from) { return read<F>(from); }
  INLINE Vector load_some(const float* from, int count) {
    return moesaic::MOESAIC_VARIANT::load_some(F32(), from, count);
  }
  INLINE F dot(Vector a, Vector b, F sum) { return multiply_add(a, b, sum); }
  INLINE F dot_lanes(uint32_t a, U b, F sum) { return multiply_add(as_floats(splat_bits(a)), as_floats(b), sum); }
};

#if defined(__AVX512BF16__)
struct Bf16Kind {
  typedef BF16 Format;
  typedef uint16_t Element;
  typedef __m512bh Vector;
  static constexpr int width = 32, pack = 2;
  INLINE Vector load(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }
  INLINE Vector load_some(const uint16_t* from, int count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), from);
  }
  INLINE F dot(Vector a, Vector b, F sum) { return _mm512_dpbf16_ps(sum, a, b); }
  INLINE F dot_lanes(uint32_t a, U b, F sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

}  // namespace moesaic::MOESAIC_VARIANT
