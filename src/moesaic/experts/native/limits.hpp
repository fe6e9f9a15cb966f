// What the machine can do at best: bytes read, and multiply-adds on registers.
#pragma once
#include "kind.hpp"
#include "team.hpp"

namespace moesaic::MOESAIC_VARIANT {

INLINE uint64_t checksum(const char* from, const char* to) {
  U sums[4] = {};
  const char* at = from;
  for (; at + sizeof sums <= to; at += sizeof sums)
    for (int i = 0; i < 4; ++i) sums[i] ^= read<U>(at + i * sizeof(U));
  uint64_t total = 0;
  for (; at < to; ++at) total += uint8_t(*at);
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < W; ++lane) total += sums[i][lane];
  return total;
}

inline uint64_t read_all(const void* data, int64_t bytes, int32_t threads) {
  const char* const from = static_cast<const char*>(data);
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total)
  for (int32_t part = 0; part < threads; ++part)
    total += checksum(from + bytes / threads * part,
                      part + 1 < threads ? from + bytes / threads * (part + 1) : from + bytes);
  return total;
}

constexpr int SUMS = W == 16 ? 24 : 12;  // enough independent sums to hide an instruction's latency

// Keeps the compiler from working out what a loop will give.
INLINE void opaque(F& value) {
#if defined(__AVX512F__)
  __asm__ volatile("" : "+v"(value));
#elif defined(__SSE__)
  __asm__ volatile("" : "+x"(value));
#else
  __asm__ volatile("" : "+w"(value));
#endif
}

template <class Kind>
double chains(int64_t steps, int32_t threads) {
  float kept = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : kept)
  for (int32_t part = 0; part < threads; ++part) {
    F sums[SUMS] = {};
    U values = splat_bits(uint32_t(part));
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
      for (int i = 0; i < SUMS; ++i) {
        sums[i] = Kind::dot_lanes(1, values, sums[i]);
        opaque(sums[i]);
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; ++i) kept += sum(sums[i]);
  }
  return kept == 1.0f ? 0 : double(steps) * SUMS * W * 2 * Kind::pack * threads;
}

inline double multiply_adds(int32_t dtype, int64_t steps, int32_t threads) {
#if defined(__AVX512BF16__)
  if (dtype == MOESAIC_BF16) return chains<Bf16Kind>(steps, threads);
#endif
  (void)dtype;
  return chains<FloatKind>(steps, threads);
}

}  // namespace moesaic::MOESAIC_VARIANT
