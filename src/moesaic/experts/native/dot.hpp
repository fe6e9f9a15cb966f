// Few rows: dot products straight along the stored weights, each read once from memory while the next are fetched.
#pragma once
#include "block.hpp"

namespace moesaic::MOESAIC_VARIANT {

constexpr int DOT_OUTPUTS = 4;  // of a tile; its rows are as many as leave all sums in registers

// Fetches `share` of DOT_OUTPUTS outputs' bytes a step, from `from` on.
template <int SHARE, class Reader>
INLINE void fetch_step(const char*& from) {
#pragma GCC unroll 4
  for (int line = 0; line * 64 < SHARE * Reader::bytes; ++line) __builtin_prefetch(from + line * 64);
  from += SHARE * Reader::bytes;
}

// Sums of M rows with DOT_OUTPUTS outputs, while the weights from `ahead` on are fetched.
template <class Kind, class Reader>
struct Dot {
  typedef typename Kind::Element Element;
  static constexpr int most_rows = W == 16 ? 6 : 3;
  static constexpr int CHAINS = 4;                       // sums of one output side by side
  static constexpr int64_t DISTANCE = int64_t(8) << 10;  // bytes between what is read and what is fetched

  // One row and one output, as far as whole CHAINS vectors go: one stream through memory, faster than several.
  INLINE F line(const Reader& weights, int64_t output, const Element* row, int64_t inputs) {
    F part[CHAINS] = {};
    for (int64_t k = 0; k + CHAINS * Kind::width <= inputs; k += CHAINS * Kind::width) {
      const char* const ahead = static_cast<const char*>(weights.address(output, k)) + DISTANCE;
#pragma GCC unroll 4
      for (int line = 0; line * 64 < CHAINS * Reader::bytes; ++line) __builtin_prefetch(ahead + line * 64);
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c)
        part[c] = Kind::dot(weights.at(output, k + c * Kind::width), Kind::load(row + k + c * Kind::width), part[c]);
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
  }

  // With LINE a single row is read as `line` does, and so added up in another order than among others.
  template <int M, int SHARE, bool LINE>
  INLINE void tile(const Reader& weights, const int64_t* outputs, const char* ahead, const Element* const* rows,
                   int64_t inputs, float* sums) {
    F total[M][DOT_OUTPUTS] = {};
    int64_t k = 0;
    if constexpr (LINE) {
#pragma GCC unroll 4
      for (int j = 0; j < DOT_OUTPUTS; ++j) total[0][j] = line(weights, outputs[j], rows[0], inputs);
      k = inputs / (CHAINS * Kind::width) * (CHAINS * Kind::width);
    }
    for (; k + Kind::width <= inputs; k += Kind::width) {
      typename Kind::Vector w[DOT_OUTPUTS];
#pragma GCC unroll 4
      for (int j = 0; j < DOT_OUTPUTS; ++j) w[j] = weights.at(outputs[j], k);
      fetch_step<SHARE, Reader>(ahead);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const typename Kind::Vector x = Kind::load(rows[m] + k);
#pragma GCC unroll 4
        for (int j = 0; j < DOT_OUTPUTS; ++j) total[m][j] = Kind::dot(w[j], x, total[m][j]);
      }
    }
    if (k < inputs) {
      const int rest = int(inputs - k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const typename Kind::Vector x = Kind::load_some(rows[m] + k, rest);
#pragma GCC unroll 4
        for (int j = 0; j < DOT_OUTPUTS; ++j)
          total[m][j] = Kind::dot(weights.some(outputs[j], k, rest), x, total[m][j]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store_sums(sums + m * 2 * W, total[m][0], total[m][1], total[m][2], total[m][3]);
  }
};

template <class Dot, int SHARE, int M = 1, class Reader, class Row>
INLINE void dot_rows(int count, const Reader& weights, const int64_t* outputs, const char* ahead, const Row* rows,
                     int64_t inputs, bool row_invariant, float* sums) {
  if (count == M && M == 1 && !row_invariant) {
    Dot::template tile<M, SHARE, M == 1>(weights, outputs, ahead, rows, inputs, sums);
  } else if (count == M) {
    Dot::template tile<M, SHARE, false>(weights, outputs, ahead, rows, inputs, sums);
  } else if constexpr (M < Dot::most_rows) {
    dot_rows<Dot, SHARE, M + 1>(count, weights, outputs, ahead, rows, inputs, row_invariant, sums);
  }
}

template <class Dot, class Reader, class Row>
INLINE void dot_outputs(const Reader& weights, const Block& block, const Row* rows, int num_rows, int64_t inputs,
                        bool row_invariant, float* sums) {
  const int passes = (num_rows + Dot::most_rows - 1) / Dot::most_rows;
  for (int v = 0; v < 2; ++v) {
    for (int o = 0; o < block.count[v]; o += DOT_OUTPUTS) {
      int64_t outputs[DOT_OUTPUTS];  // the last one again where there are fewer
      for (int j = 0; j < DOT_OUTPUTS; ++j)
        outputs[j] = block.first[v] + (o + j < block.count[v] ? o + j : block.count[v] - 1);
      // The weights that follow are fetched a share in each pass, so that memory and arithmetic both stay busy.
      const char* ahead = static_cast<const char*>(weights.address(outputs[0] + DOT_OUTPUTS, 0));
      for (int pass = 0; pass < passes; ++pass) {
        const int begin = num_rows * pass / passes, count = num_rows * (pass + 1) / passes - begin;
        float* to = sums + begin * 2 * W + v * W + o;
        if (passes == 1) {
          dot_rows<Dot, 4>(count, weights, outputs, ahead, rows + begin, inputs, row_invariant, to);
        } else if (passes <= 3) {
          dot_rows<Dot, 2>(count, weights, outputs, ahead, rows + begin, inputs, row_invariant, to);
          ahead += 2 * weights.row_bytes(inputs);
        } else {
          dot_rows<Dot, 1>(count, weights, outputs, ahead, rows + begin, inputs, row_invariant, to);
          ahead += weights.row_bytes(inputs);
        }
      }
    }
  }
}

template <class Kind, class Reader>
void dot_block(const Reader& weights, const Block& block, const typename Kind::Element* const* rows, int num_rows,
               int64_t inputs, bool row_invariant, Workspace& workspace) {
  dot_outputs<Dot<Kind, Reader>>(weights, block, rows, num_rows, inputs, row_invariant, workspace.sums);
}

}  // namespace moesaic::MOESAIC_VARIANT
