// Rows of features times one expert's matrix, for a block of its outputs: what every pass of the layer is made of.
//
// Two engines. Few rows: dot products straight along the stored weights, each read once from memory while the next
// ones are prefetched. Many rows: the block's weights are repacked into a panel in which the outputs lie side by side,
// and tiles of rows are multiplied with it from the nearest cache. Both sum in float32.
#pragma once
#include "matrix.hpp"

namespace moesaic::MOESAIC_VARIANT {

constexpr int DOT_OUTPUTS = 4;                                    // a dot tile: outputs times
constexpr int DOT_ROWS = W == 16 ? 6 : 3;                         // rows; as many sums as registers hold
constexpr int TILE_ROWS = W == 16 ? 12 : W == 8 ? 6 : 4;          // a panel tile: rows times two vectors of outputs
constexpr int BLOCK_ROWS = 96;                                    // rows whose sums are kept at once
constexpr int PANEL_FROM = W == 16 ? 24 : 12;                     // rows from which repacking pays
#ifndef HINT
#define HINT 3
#endif
constexpr int STEPS = 128;                                        // of a panel that stay in the first cache

// Two vectors of neighbouring outputs: for a gated up projection the gate's and the up's, else one after the other.
struct Block {
  int64_t first[2];
  int count[2];  // at most W; 0 or less where there are none
};

struct Workspace {
  uint32_t* panel;  // [2, steps, W]
  float sums[BLOCK_ROWS * 2 * W];
};

inline int64_t steps_of(int64_t inputs, int pack) { return (inputs + pack - 1) / pack; }

// Rounded up to whole vectors, so that packing never needs to stop inside one.
inline int64_t panel_bytes(int64_t inputs) { return 2 * ((inputs + W - 1) / W * W) * W * 4; }

// ---- few rows ----

// `ahead` is prefetched, LINES cache lines a step.
template <class Kind, class Reader, int M, int LINES>
INLINE void dot_tile(const Reader& weights, const int64_t* outputs, const char* ahead,
                     const typename Kind::Element* const* rows, int64_t inputs, float* sums) {
  F total[M][DOT_OUTPUTS] = {};
  int64_t k = 0;
  for (; k + Kind::width <= inputs; k += Kind::width) {
    typename Kind::Vector w[DOT_OUTPUTS];
#pragma GCC unroll 4
    for (int j = 0; j < DOT_OUTPUTS; ++j) w[j] = weights.at(outputs[j], k);
#pragma GCC unroll 4
    for (int i = 0; i < LINES; ++i) __builtin_prefetch(ahead + i * 64, 0, HINT);
    ahead += LINES * 64;
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
      for (int j = 0; j < DOT_OUTPUTS; ++j) total[m][j] = Kind::dot(weights.some(outputs[j], k, rest), x, total[m][j]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store_sums(sums + m * 2 * W, total[m][0], total[m][1], total[m][2], total[m][3]);
}

template <class Kind, class Reader, int LINES, int M = 1>
INLINE void dot_rows(int count, const Reader& weights, const int64_t* outputs, const char* ahead,
                     const typename Kind::Element* const* rows, int64_t inputs, float* sums) {
  if (count == M) {
    dot_tile<Kind, Reader, M, LINES>(weights, outputs, ahead, rows, inputs, sums);
  } else if constexpr (M < DOT_ROWS) {
    dot_rows<Kind, Reader, LINES, M + 1>(count, weights, outputs, ahead, rows, inputs, sums);
  }
}

template <class Kind, class Reader>
void dot_block(const Reader& weights, const Block& block, const typename Kind::Element* const* rows, int num_rows,
               int64_t inputs, float* sums) {
  const int passes = (num_rows + DOT_ROWS - 1) / DOT_ROWS;
  for (int v = 0; v < 2; ++v) {
    for (int o = 0; o < block.count[v]; o += DOT_OUTPUTS) {
      int64_t outputs[DOT_OUTPUTS];  // the last one again where there are fewer
      for (int j = 0; j < DOT_OUTPUTS; ++j)
        outputs[j] = block.first[v] + (o + j < block.count[v] ? o + j : block.count[v] - 1);
      // The weights that follow are fetched a share in each pass, so that memory and arithmetic both stay busy.
      const char* ahead = static_cast<const char*>(weights.address(outputs[0] + DOT_OUTPUTS, 0));
      const int64_t lines = inputs / Kind::width * 64;
      for (int pass = 0; pass < passes; ++pass) {
        const int begin = num_rows * pass / passes, end = num_rows * (pass + 1) / passes;
        float* to = sums + begin * 2 * W + v * W + o;
        if (passes == 1) {
          dot_rows<Kind, Reader, 4>(end - begin, weights, outputs, ahead, rows + begin, inputs, to);
        } else if (passes <= 3) {
          dot_rows<Kind, Reader, 2>(end - begin, weights, outputs, ahead + pass * 2 * lines, rows + begin, inputs, to);
        } else {
          dot_rows<Kind, Reader, 1>(end - begin, weights, outputs, ahead + pass * lines, rows + begin, inputs, to);
        }
      }
    }
  }
}

// ---- many rows ----

// Where consecutive inputs lie side by side: W outputs at a time, transposed.
template <class Kind, class Reader>
void pack_outputs(const Reader& weights, int64_t first, int count, int64_t inputs, uint32_t* panel) {
  for (int64_t k = 0; k < inputs; k += Kind::width, panel += W * W) {
    U lanes[W];
    const int rest = inputs - k < Kind::width ? int(inputs - k) : 0;
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) {
      if (j >= count) {
        lanes[j] = U{};
      } else {
        const auto values = rest ? weights.some(first + j, k, rest) : weights.at(first + j, k);
        memcpy(&lanes[j], &values, sizeof lanes[j]);
      }
    }
    store_transposed(panel, lanes);
  }
}

// Where consecutive outputs lie side by side (float formats only): copied, for bfloat16 in pairs of inputs. Rows may be
// given by pointers of their own, for they may be any tokens'.
template <class Kind, class Format, class RowOf>
void pack_inputs(const RowOf& row_of, int count, int64_t inputs, uint32_t* panel, int64_t panel_stride) {
  for (int64_t k = 0; k < inputs; k += Kind::pack, panel += panel_stride) {
    const typename Format::Element* row = row_of(k);
    U lanes;
    if constexpr (Kind::pack == 1) {
      lanes = as_bits(load_up_to(Format(), row, count));
    } else {
      lanes = as_bits(load_up_to(Format(), row, count)) >> 16;
      if (k + 1 < inputs) lanes |= as_bits(load_up_to(Format(), row_of(k + 1), count));
    }
    memcpy(panel, &lanes, sizeof lanes);
  }
}

template <class Kind>
void pack_panel(const Matrix& matrix, int64_t first, int count, int64_t inputs, uint32_t* panel) {
  if (count <= 0) {
    memset(panel, 0, size_t(steps_of(inputs, Kind::pack)) * W * 4);
  } else if (matrix.in_stride == element_size(matrix.format)) {
    Readers<Kind>::choose(matrix, [&](auto weights) { pack_outputs<Kind>(weights, first, count, inputs, panel); });
  } else {
    auto pack = [&](auto format) {
      typedef decltype(format) Format;
      const char* data = matrix.data + first * element_size(matrix.format);
      auto row_of = [&](int64_t k) {
        return reinterpret_cast<const typename Format::Element*>(data + k * matrix.in_stride);
      };
      pack_inputs<Kind, Format>(row_of, count, inputs, panel, W);
    };
    if constexpr (Kind::pack == 2) {
      pack(BF16());
    } else {
      matrix.format == MOESAIC_F32 ? pack(F32()) : matrix.format == MOESAIC_BF16 ? pack(BF16()) : pack(F16());
    }
  }
}

// `lane(m, s)` is the 32-bit lane of row m at step s.
template <class Kind, int M, class Lane>
INLINE void tile(const Lane& lane, int64_t steps, const uint32_t* panel, int64_t half, float* sums, bool first) {
  F total[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    total[m][0] = first ? F{} : read<F>(sums + m * 2 * W);
    total[m][1] = first ? F{} : read<F>(sums + m * 2 * W + W);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const U low = read<U>(panel + s * W), high = read<U>(panel + half + s * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const uint32_t x = lane(m, s);
      total[m][0] = Kind::dot_lanes(x, low, total[m][0]);
      total[m][1] = Kind::dot_lanes(x, high, total[m][1]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    memcpy(sums + m * 2 * W, &total[m][0], sizeof(F));
    memcpy(sums + m * 2 * W + W, &total[m][1], sizeof(F));
  }
}

template <class Kind, class Lanes, int M = TILE_ROWS>
INLINE void tile_rows(int count, const Lanes& lanes, int64_t steps, const uint32_t* panel, int64_t half, float* sums,
                      bool first) {
  if (count == M) {
    lanes.template with<Kind, M>(steps, panel, half, sums, first);
  } else if constexpr (M > 1) {
    tile_rows<Kind, Lanes, M - 1>(count, lanes, steps, panel, half, sums, first);
  }
}

// Lanes of rows that are given by pointers.
struct RowLanes {
  const char* const* rows;
  int64_t offset;  // bytes
  template <class Kind, int M>
  INLINE_MEMBER void with(int64_t steps, const uint32_t* panel, int64_t half, float* sums, bool first) const {
    const char* at[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) at[m] = rows[m] + offset;
    tile<Kind, M>([&](int m, int64_t s) { return read<uint32_t>(at[m] + s * 4); }, steps, panel, half, sums, first);
  }
};

// Lanes of rows that lie side by side, one step after the other.
struct PackedLanes {
  const uint32_t* lanes;
  int64_t stride;
  template <class Kind, int M>
  INLINE_MEMBER void with(int64_t steps, const uint32_t* panel, int64_t half, float* sums, bool first) const {
    const uint32_t* from = lanes;
    const int64_t step = stride;
    tile<Kind, M>([&](int m, int64_t s) { return from[s * step + m]; }, steps, panel, half, sums, first);
  }
};

// The sums of up to BLOCK_ROWS rows with a packed panel of `steps` steps; `lanes_of(row, step)` are where they begin.
template <class Kind, class LanesOf>
INLINE void panel_block(const LanesOf& lanes_of, int num_rows, int64_t steps, const uint32_t* panel, int64_t half,
                 float* sums) {
  for (int64_t s = 0; s < steps; s += STEPS) {
    const int64_t part = steps - s < STEPS ? steps - s : STEPS;
    for (int r = 0; r < num_rows; r += TILE_ROWS) {
      const int rows = num_rows - r < TILE_ROWS ? num_rows - r : TILE_ROWS;
      tile_rows<Kind>(rows, lanes_of(r, s), part, panel + s * W, half, sums + r * 2 * W, s == 0);
    }
  }
  if (!steps) memset(sums, 0, size_t(num_rows) * 2 * W * 4);
}

template <class Kind>
__attribute__((noinline)) void panel_rows(const typename Kind::Element* const* rows, int num_rows, int64_t steps,
                                          const uint32_t* panel, int64_t half, float* sums) {
  auto at = reinterpret_cast<const char* const*>(rows);
  panel_block<Kind>([&](int r, int64_t s) { return RowLanes{at + r, s * 4}; }, num_rows, steps, panel, half, sums);
}

template <class Kind>
__attribute__((noinline)) void panel_lanes(const uint32_t* lanes, int64_t stride, int num_rows, int64_t steps,
                                           const uint32_t* panel, int64_t half, float* sums) {
  panel_block<Kind>([&](int r, int64_t s) { return PackedLanes{lanes + s * stride + r, stride}; }, num_rows, steps, panel,
                    half, sums);
}

// ---- either ----

INLINE void scale_sums(const Matrix& matrix, const Block& block, int num_rows, float* sums) {
  for (int v = 0; v < 2; ++v) {
    const F scale = load_up_to(F32(), matrix.scale + block.first[v], block.count[v]);
    for (int r = 0; r < num_rows; ++r) {
      float* at = sums + r * 2 * W + v * W;
      store(F32(), at, read<F>(at) * scale);
    }
  }
}

// rows[r] · matrix for the outputs of `block`; calls done(begin, count, sums) for every part of the rows.
template <class Kind, class Done>
void product(const Matrix& matrix, const Block& block, const typename Kind::Element* const* rows, int64_t num_rows,
             int64_t inputs, Workspace& workspace, const Done& done) {
  const bool by_panel = num_rows >= PANEL_FROM || matrix.in_stride != element_size(matrix.format);
  const int64_t steps = steps_of(inputs, Kind::pack), half = (steps + W - 1) / W * W * W;
  if (by_panel)
    for (int v = 0; v < 2; ++v)
      pack_panel<Kind>(matrix, block.first[v], block.count[v], inputs, workspace.panel + v * half);
  for (int64_t begin = 0; begin < num_rows; begin += BLOCK_ROWS) {
    const int count = num_rows - begin < BLOCK_ROWS ? int(num_rows - begin) : BLOCK_ROWS;
    if (by_panel) {
      panel_rows<Kind>(rows + begin, count, steps, workspace.panel, half, workspace.sums);
    } else {
      Readers<Kind>::choose(matrix, [&](auto weights) {
        dot_block<Kind>(weights, block, rows + begin, count, inputs, workspace.sums);
      });
    }
    if (matrix.scale) scale_sums(matrix, block, count, workspace.sums);
    done(begin, count, workspace.sums);
  }
}

}  // namespace
