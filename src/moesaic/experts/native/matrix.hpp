// The weights of one expert as the kernels read them: vectors of consecutive inputs of one output, in any format.
#pragma once
#include "kind.hpp"

namespace moesaic::MOESAIC_VARIANT {

// One expert's matrix. Strides count bytes, except that the one of 1 element is the element's size.
struct Matrix {
  const char* data;
  int64_t out_stride, in_stride;
  int format;
  int group_shift;         // int4: inputs per scale, as a power of two
  const float* scale;      // int8: per output
  const uint16_t* scales;  // int4: bfloat16, per output and group
  int64_t scales_stride;   // int4: elements from output to output
};

constexpr int element_size(int format) {
  return format == MOESAIC_F32 ? 4 : format == MOESAIC_BF16 || format == MOESAIC_F16 ? 2 : 1;
}

inline int64_t padded_inputs(int64_t inputs) { return (inputs + 127) / 128 * 128; }  // of an int4 row

INLINE Matrix matrix_of(const MoesaicMatrix& all, int64_t expert, int64_t outputs, int64_t inputs) {
  const int size = element_size(all.format);
  Matrix one = {};
  one.data = static_cast<const char*>(all.data) + expert * all.expert_stride * size;
  one.out_stride = all.out_stride * size;
  one.in_stride = all.in_stride * size;
  one.format = all.format;
  if (all.format == MOESAIC_INT8) one.scale = static_cast<const float*>(all.scale) + expert * outputs;
  if (all.format == MOESAIC_INT4) {
    one.group_shift = all.group == 32 ? 5 : 6;
    one.scales_stride = padded_inputs(inputs) >> one.group_shift;
    one.scales = static_cast<const uint16_t*>(all.scale) + expert * outputs * one.scales_stride;
  }
  return one;
}

// The same weights as the map from outputs to inputs; float formats only.
INLINE Matrix transposed(Matrix matrix) {
  const int64_t out_stride = matrix.out_stride;
  matrix.out_stride = matrix.in_stride;
  matrix.in_stride = out_stride;
  return matrix;
}

// ---- readers: `at(output, k)` is a vector of the inputs k, k + 1, ... of an output; `some` of the last `count`;
// `ready` says that memory holds the vectors as they are, `bytes` each ----

template <class Kind, class Format>
struct Floats {
  static constexpr bool ready = sizeof(typename Format::Element) == 4;
  static constexpr int bytes = W * int(sizeof(typename Format::Element));
  Matrix matrix;
  typedef typename Format::Element Element;
  INLINE_MEMBER const Element* row(int64_t output) const {
    return reinterpret_cast<const Element*>(matrix.data + output * matrix.out_stride);
  }
  INLINE_MEMBER F at(int64_t output, int64_t k) const { return load(Format(), row(output) + k); }
  INLINE_MEMBER F some(int64_t output, int64_t k, int count) const {
    return load_some(Format(), row(output) + k, count);
  }
  INLINE_MEMBER int64_t row_bytes(int64_t inputs) const { return inputs * int64_t(sizeof(Element)); }
  INLINE_MEMBER const void* address(int64_t output, int64_t k) const { return row(output) + k; }
};

template <class Kind>
struct Int8 {
  static constexpr bool ready = false;
  static constexpr int bytes = W;
  Matrix matrix;
  INLINE_MEMBER const int8_t* row(int64_t output) const {
    return reinterpret_cast<const int8_t*>(matrix.data + output * matrix.out_stride);
  }
  INLINE_MEMBER F at(int64_t output, int64_t k) const { return __builtin_convertvector(read<I8>(row(output) + k), F); }
  INLINE_MEMBER F some(int64_t output, int64_t k, int count) const {
    return __builtin_convertvector(read_some<I8>(row(output) + k, count), F);
  }
  INLINE_MEMBER int64_t row_bytes(int64_t inputs) const { return inputs; }
  INLINE_MEMBER const void* address(int64_t output, int64_t k) const { return row(output) + k; }
};

template <class Kind>
struct Int4 {
  static constexpr bool ready = false;
  static constexpr int bytes = W / 2;
  Matrix matrix;
  INLINE_MEMBER F at(int64_t output, int64_t k) const {
    const char* row = matrix.data + output * matrix.out_stride;
    const U16 words = read<U16>(row + (k >> 7) * 64 + (k & 31) * 2) >> int((k >> 5) & 3) * 4;
    const F values = __builtin_convertvector((I)(__builtin_convertvector(words, U) & 15) - 8, F);
    const uint32_t scale = uint32_t(matrix.scales[output * matrix.scales_stride + (k >> matrix.group_shift)]) << 16;
    return values * as_floats(splat_bits(scale));
  }
  // Rows are padded with zeros.
  INLINE_MEMBER F some(int64_t output, int64_t k, int) const { return at(output, k); }
  INLINE_MEMBER int64_t row_bytes(int64_t inputs) const { return inputs / 2; }
  INLINE_MEMBER const void* address(int64_t output, int64_t k) const {
    return matrix.data + output * matrix.out_stride + k / 2;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Floats<Bf16Kind, BF16> {
  static constexpr bool ready = true;
  static constexpr int bytes = 64;
  Matrix matrix;
  INLINE_MEMBER const uint16_t* row(int64_t output) const {
    return reinterpret_cast<const uint16_t*>(matrix.data + output * matrix.out_stride);
  }
  INLINE_MEMBER __m512bh at(int64_t output, int64_t k) const { return Bf16Kind::load(row(output) + k); }
  INLINE_MEMBER __m512bh some(int64_t output, int64_t k, int count) const {
    return Bf16Kind::load_some(row(output) + k, count);
  }
  INLINE_MEMBER int64_t row_bytes(int64_t inputs) const { return inputs * 2; }
  INLINE_MEMBER const void* address(int64_t output, int64_t k) const { return row(output) + k; }
};

INLINE __m512bh round_pair(F low, F high) { return _mm512_cvtne2ps_pbh(high, low); }

template <>
struct Int8<Bf16Kind> {
  static constexpr bool ready = false;
  static constexpr int bytes = 32;
  Matrix matrix;
  INLINE_MEMBER __m512bh convert(__m256i bytes) const {
    return round_pair(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes))),
                      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1))));
  }
  INLINE_MEMBER __m512bh at(int64_t output, int64_t k) const {
    return convert(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(matrix.data + output * matrix.out_stride + k)));
  }
  INLINE_MEMBER __m512bh some(int64_t output, int64_t k, int count) const {
    return convert(
        _mm256_maskz_loadu_epi8(__mmask32((uint64_t(1) << count) - 1), matrix.data + output * matrix.out_stride + k));
  }
  INLINE_MEMBER int64_t row_bytes(int64_t inputs) const { return inputs; }
  INLINE_MEMBER const void* address(int64_t output, int64_t k) const {
    return matrix.data + output * matrix.out_stride + k;
  }
};

template <>
struct Int4<Bf16Kind> {
  static constexpr bool ready = false;
  static constexpr int bytes = 16;
  Matrix matrix;
  INLINE_MEMBER __m512bh at(int64_t output, int64_t k) const {
    const Int4<FloatKind> floats = {matrix};
    return round_pair(floats.at(output, k), floats.at(output, k + 16));
  }
  INLINE_MEMBER __m512bh some(int64_t output, int64_t k, int) const { return at(output, k); }
  INLINE_MEMBER int64_t row_bytes(int64_t inputs) const { return inputs / 2; }
  INLINE_MEMBER const void* address(int64_t output, int64_t k) const {
    return matrix.data + output * matrix.out_stride + k / 2;
  }
};
#endif

// Calls `work` with the reader that fits the matrix's format.
template <class Kind>
struct Readers {
  template <class Work>
  INLINE void choose(const Matrix& matrix, const Work& work) {
    switch (matrix.format) {
      case MOESAIC_F32:
        return work(Floats<Kind, F32>{matrix});
      case MOESAIC_BF16:
        return work(Floats<Kind, BF16>{matrix});
      case MOESAIC_F16:
        return work(Floats<Kind, F16>{matrix});
      case MOESAIC_INT8:
        return work(Int8<Kind>{matrix});
      default:
        return work(Int4<Kind>{matrix});
    }
  }
};

#if defined(__AVX512BF16__)
template <>
struct Readers<Bf16Kind> {
  template <class Work>
  INLINE void choose(const Matrix& matrix, const Work& work) {
    switch (matrix.format) {
      case MOESAIC_BF16:
        return work(Floats<Bf16Kind, BF16>{matrix});
      case MOESAIC_INT8:
        return work(Int8<Bf16Kind>{matrix});
      default:
        return work(Int4<Bf16Kind>{matrix});
    }
  }
};
#endif

}  // namespace moesaic::MOESAIC_VARIANT
