// Few rows times four-bit codes, where registers hold bfloat16 pairs: codes become numbers a register at a time.
#pragma once
#include "dot.hpp"

namespace moesaic::MOESAIC_VARIANT {

#if defined(__AVX512BF16__)

// A 16-bit word holds four codes of 32 inputs each, 32 inputs apart; shifted, its low bits look up the code's value.
template <>
struct Dot<Bf16Kind, Int4<Bf16Kind>> {
  typedef Int4<Bf16Kind> Reader;
  static constexpr int most_rows = 4;
  static constexpr int SCALES = 16;  // converted at once

  // Code minus 8 as bfloat16; 32 entries, so that the fifth bit, the next code's first, does not matter.
  INLINE __m512i values() {
    alignas(64) static const uint16_t table[32] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                   0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                   0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                   0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    return _mm512_load_si512(table);
  }

  template <int M, int SHARE, bool>  // one row is added up as several are
  INLINE void tile(const Reader& weights, const int64_t* outputs, const char* ahead, const uint16_t* const* rows,
                   int64_t inputs, float* sums) {
    const Matrix& matrix = weights.matrix;
    const int shift = matrix.group_shift;
    const __m512i table = values();
    F total[M][DOT_OUTPUTS] = {};
    float scales[DOT_OUTPUTS][SCALES];
    const char* codes[DOT_OUTPUTS];
    for (int j = 0; j < DOT_OUTPUTS; ++j) codes[j] = matrix.data + outputs[j] * matrix.out_stride;
    for (int64_t k = 0; k < inputs; k += 128) {
      const int64_t group = k >> shift;
      if (group % SCALES == 0)
        for (int j = 0; j < DOT_OUTPUTS; ++j)
          store(F32(), scales[j],
                load_up_to(BF16(), matrix.scales + outputs[j] * matrix.scales_stride + group,
                           matrix.scales_stride - group));
      __m512i words[DOT_OUTPUTS];
#pragma GCC unroll 4
      for (int j = 0; j < DOT_OUTPUTS; ++j) words[j] = _mm512_loadu_si512(codes[j] + k / 2);
#pragma GCC unroll 4
      for (int line = 0; line < SHARE; ++line) __builtin_prefetch(ahead + line * 64);
      ahead += SHARE * 64;
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const int64_t at = k + 32 * part;
        const int64_t rest = inputs - at;
        const float* scale = &scales[0][(at >> shift) % SCALES];
        if (rest <= 0) break;
        __m512bh x[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
          x[m] = rest >= 32 ? Bf16Kind::load(rows[m] + at) : Bf16Kind::load_some(rows[m] + at, int(rest));
#pragma GCC unroll 4
        for (int j = 0; j < DOT_OUTPUTS; ++j) {
          const __m512bh w = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words[j], 4 * part), table);
          const F by = splat(scale[j * SCALES]);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) total[m][j] = multiply_add(Bf16Kind::dot(w, x[m], F{}), by, total[m][j]);
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) store_sums(sums + m * 2 * W, total[m][0], total[m][1], total[m][2], total[m][3]);
  }
};

#endif

}  // namespace moesaic::MOESAIC_VARIANT
