// A vector of W floats for the instruction set that this file is compiled for.
//
// Everything here, as in every header of a variant, lives in a namespace of the variant's own, and no standard-library
// templates are used: two variants' copies of one inline function would be merged by the linker, and the survivor could
// hold instructions that the CPU lacks.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "moesaic.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

namespace moesaic::MOESAIC_VARIANT {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t U16 __attribute__((vector_size(2 * W)));
typedef int8_t I8 __attribute__((vector_size(W)));

INLINE F splat(float value) { return value - F{}; }
INLINE U splat_bits(uint32_t value) { return value - U{}; }
INLINE F as_floats(U bits) { return (F)bits; }
INLINE U as_bits(F values) { return (U)values; }

template <class T>
INLINE T read(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

// The first `count` elements, zeros after them; for the rare end of a row.
template <class T, class Element>
INLINE T read_some(const Element* from, int count) {
  Element values[W] = {};
  for (int i = 0; i < count; ++i) values[i] = from[i];
  return read<T>(values);
}

template <class T, class Element>
INLINE void write_some(Element* to, T vector, int count) {
  Element values[W];
  memcpy(values, &vector, sizeof vector);
  for (int i = 0; i < count; ++i) to[i] = values[i];
}

INLINE F multiply_add(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE F select(I mask, F yes, F no) { return as_floats(((U)mask & as_bits(yes)) | (~(U)mask & as_bits(no))); }

INLINE F absolute(F x) { return as_floats(as_bits(x) & splat_bits(0x7fffffff)); }

// ---- the number formats of tensors: load<Format>(pointer) gives floats, store<Format> rounds to nearest even ----

struct F32 {
  typedef float Element;
};
struct BF16 {
  typedef uint16_t Element;
};
struct F16 {
  typedef uint16_t Element;
};

INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {  // zero or subnormal: the fraction counts units of 2^-24
    const float value = float(fraction) * 0x1p-24f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or beyond: infinity
  if (size < 0x38800000) {                                 // below the least normal number
    float magnitude;
    memcpy(&magnitude, &size, 4);
    return uint16_t(sign | uint32_t(nearbyintf(magnitude * 0x1p24f)));
  }
  return uint16_t(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}

INLINE F bf16_to_floats(U16 values) { return as_floats(__builtin_convertvector(values, U) << 16); }

INLINE U16 floats_to_bf16(F values) {
#if defined(__AVX512BF16__)
  return (U16)_mm512_cvtneps_pbh(values);
#else
  const U bits = as_bits(values);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U quiet = (bits >> 16) | 0x40;
  const U is_nan = (U)((bits & 0x7fffffff) > splat_bits(0x7f800000));
  return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), U16);
#endif
}

INLINE F f16_to_floats(U16 values) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)values);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)values);
#else
  F result;
  for (int i = 0; i < W; ++i) result[i] = half_to_float(values[i]);
  return result;
#endif
}

INLINE U16 floats_to_f16(F values) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (U16)_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  U16 result;
  for (int i = 0; i < W; ++i) result[i] = float_to_half(values[i]);
  return result;
#endif
}

INLINE F load(F32, const float* from) { return read<F>(from); }
INLINE F load(BF16, const uint16_t* from) { return bf16_to_floats(read<U16>(from)); }
INLINE F load(F16, const uint16_t* from) { return f16_to_floats(read<U16>(from)); }

INLINE F load_some(F32, const float* from, int count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#else
  return read_some<F>(from, count);
#endif
}
INLINE U16 load_some_16(const uint16_t* from, int count) {
#if defined(__AVX512F__)
  return (U16)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
#else
  return read_some<U16>(from, count);
#endif
}
INLINE F load_some(BF16, const uint16_t* from, int count) { return bf16_to_floats(load_some_16(from, count)); }
INLINE F load_some(F16, const uint16_t* from, int count) { return f16_to_floats(load_some_16(from, count)); }

INLINE void store(F32, float* to, F values) { memcpy(to, &values, sizeof values); }
INLINE void store_16(uint16_t* to, U16 values) { memcpy(to, &values, sizeof values); }
INLINE void store(BF16, uint16_t* to, F values) { store_16(to, floats_to_bf16(values)); }
INLINE void store(F16, uint16_t* to, F values) { store_16(to, floats_to_f16(values)); }

INLINE void store_some(F32, float* to, F values, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), values);
#else
  write_some(to, values, count);
#endif
}
INLINE void store_some_16(uint16_t* to, U16 values, int count) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), (__m256i)values);
#else
  write_some(to, values, count);
#endif
}
INLINE void store_some(BF16, uint16_t* to, F values, int count) { store_some_16(to, floats_to_bf16(values), count); }
INLINE void store_some(F16, uint16_t* to, F values, int count) { store_some_16(to, floats_to_f16(values), count); }

// `count` may be W or more; then all W are meant.
template <class Format>
INLINE F load_up_to(Format format, const typename Format::Element* from, int64_t count) {
  return count >= W ? load(format, from) : count <= 0 ? F{} : load_some(format, from, int(count));
}
template <class Format>
INLINE void store_up_to(Format format, typename Format::Element* to, F values, int64_t count) {
  if (count >= W) {
    store(format, to, values);
  } else if (count > 0) {
    store_some(format, to, values, int(count));
  }
}

// 2 W neighbours.
INLINE void store_pair(F32, float* to, F low, F high) { store(F32(), to, low), store(F32(), to + W, high); }
INLINE void store_pair(F16, uint16_t* to, F low, F high) { store(F16(), to, low), store(F16(), to + W, high); }
INLINE void store_pair(BF16, uint16_t* to, F low, F high) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
  store(BF16(), to, low), store(BF16(), to + W, high);
#endif
}

// Zeros beyond the first `count` lanes.
INLINE F first_lanes(F values, int64_t count) {
  if (count >= W) return values;
  float lanes[W];
  memcpy(lanes, &values, sizeof values);
  return read_some<F>(lanes, int(count));
}

// ---- sums across lanes ----

INLINE float sum(F values) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(values);
#else
  float total[W];
  memcpy(total, &values, sizeof total);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) total[i] += total[i + half];
  return total[0];
#endif
}

// The four sums of four vectors, side by side.
INLINE void store_sums(float* to, F a, F b, F c, F d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512 abcd =
      (__m512)(_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd)) + (__m512)(_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
  const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
  _mm_storeu_ps(to, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1));
#else
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

// ---- W vectors of W 32-bit values, transposed into W * W consecutive values ----

INLINE void store_transposed(uint32_t* to, const U* rows) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32((__m512i)rows[2 * i], (__m512i)rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)rows[2 * i], (__m512i)rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + 16 * i, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
    _mm512_storeu_si512(to + 16 * (i + 8), _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
    _mm512_storeu_si512(to + 16 * (i + 4), _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88));
    _mm512_storeu_si512(to + 16 * (i + 12), _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd));
  }
#elif defined(__AVX2__)
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi32((__m256i)rows[2 * i], (__m256i)rows[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)rows[2 * i], (__m256i)rows[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256((__m256i*)(to + 8 * i), _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
    _mm256_storeu_si256((__m256i*)(to + 8 * (i + 4)), _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
  }
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) to[i * W + j] = rows[j][i];
#endif
}

#if defined(__AVX512F__)
// The same from memory, `stride` bytes from one row to the next: half of the work is left to the loads.
INLINE void store_transposed(uint32_t* to, const char* rows, int64_t stride) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512i a[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const char* from = rows + i * stride + quarter * 16;
      a[i] = _mm512_castsi128_si512(read<__m128i>(from));
      a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00f0, read<__m128i>(from + 4 * stride));
      a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0f00, read<__m128i>(from + 8 * stride));
      a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xf000, read<__m128i>(from + 12 * stride));
    }
    const __m512i low = _mm512_unpacklo_epi32(a[0], a[1]), high = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i low2 = _mm512_unpacklo_epi32(a[2], a[3]), high2 = _mm512_unpackhi_epi32(a[2], a[3]);
    uint32_t* at = to + quarter * 4 * W;
    _mm512_storeu_si512(at, _mm512_unpacklo_epi64(low, low2));
    _mm512_storeu_si512(at + W, _mm512_unpackhi_epi64(low, low2));
    _mm512_storeu_si512(at + 2 * W, _mm512_unpacklo_epi64(high, high2));
    _mm512_storeu_si512(at + 3 * W, _mm512_unpackhi_epi64(high, high2));
  }
}
#endif

// ---- e to the power of x, to about 1 part in 10^7; overflows to infinity, underflows to zero ----

INLINE F exponential(F x) {
  const F low = splat(-104.0f), high = splat(89.0f);
  x = select(x < low, low, x);  // a NaN fails both comparisons and stays
  x = select(x > high, high, x);
  const F shifted =
      multiply_add(x, splat(1.44269504f), splat(0x1.8p23f));  // the low bits now hold the rounded exponent
  const F power = shifted - splat(0x1.8p23f);
  F rest = multiply_add(power, splat(-0x1.62e4p-1f), x);
  rest = multiply_add(power, splat(-0x1.7f7d1cp-20f), rest);
  // Taylor's series to the sixth power; |rest| <= ln(2) / 2.
  F sum = splat(1.0f / 720);
  sum = multiply_add(sum, rest, splat(1.0f / 120));
  sum = multiply_add(sum, rest, splat(1.0f / 24));
  sum = multiply_add(sum, rest, splat(1.0f / 6));
  sum = multiply_add(sum, rest, splat(0.5f));
  sum = multiply_add(sum, rest, splat(1.0f));
  sum = multiply_add(sum, rest, splat(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(sum, power);
#else
  // In two steps, because 2^128 and 2^-150 are no normal floats.
  const I whole = (I)as_bits(shifted) - (I)as_bits(splat(0x1.8p23f)), half = whole >> 1;
  return sum * as_floats((U)(half + 127) << 23) * as_floats((U)(whole - half + 127) << 23);
#endif
}

}  // namespace moesaic::MOESAIC_VARIANT
