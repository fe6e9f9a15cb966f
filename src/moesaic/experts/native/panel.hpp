// Many rows: weights are repacked so that the outputs lie side by side, a part of the inputs at a time, and tiles of
// rows are multiplied with them from the first cache.
#pragma once
#include "block.hpp"

namespace moesaic::MOESAIC_VARIANT {

constexpr int TILE_ROWS = W == 16 ? 12 : W == 8 ? 6 : 4;  // of a tile with two vectors of outputs

inline int64_t steps_of(int64_t inputs, int pack) { return (inputs + pack - 1) / pack; }

// Inputs [begin, end) where consecutive inputs lie side by side: W outputs at a time, transposed.
template <class Kind, class Reader>
void pack_outputs(const Reader& weights, int64_t first, int count, int64_t begin, int64_t end, uint32_t* panel) {
  int64_t k = begin;
#if defined(__AVX512F__)
  if constexpr (Reader::ready) {
    if (count >= W)
      for (; k + Kind::width <= end; k += Kind::width, panel += W * W)
        store_transposed(panel, static_cast<const char*>(weights.address(first, k)), weights.matrix.out_stride);
  }
#endif
  for (; k < end; k += Kind::width, panel += W * W) {
    U lanes[W];
    const int rest = end - k < Kind::width ? int(end - k) : 0;
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

// Inputs [begin, end) where consecutive outputs lie side by side (float formats only): copied, for bfloat16 in pairs of
// inputs. `row_of(k)` points to the outputs of input k, which may be a row of any token's.
template <class Kind, class Format, class RowOf>
INLINE void pack_inputs(const RowOf& row_of, int64_t count, int64_t begin, int64_t end, uint32_t* panel,
                        int64_t stride) {
  for (int64_t k = begin; k < end; k += Kind::pack, panel += stride) {
    U lanes = as_bits(load_up_to(Format(), row_of(k), count));
    if constexpr (Kind::pack == 2) {
      lanes >>= 16;
      if (k + 1 < end) lanes |= as_bits(load_up_to(Format(), row_of(k + 1), count));
    }
    memcpy(panel, &lanes, sizeof lanes);
  }
}

#if defined(__AVX512BF16__)
// The same for the two vectors of a whole block of neighbours at once.
template <class RowOf>
INLINE void pack_pairs(const RowOf& row_of, int64_t begin, int64_t end, uint32_t (*panel)[STEPS * W]) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  int64_t at = 0;
  for (int64_t k = begin; k < end; k += 2, at += W) {
    const __m512i even = _mm512_loadu_si512(row_of(k));
    const __m512i odd = k + 1 < end ? _mm512_loadu_si512(row_of(k + 1)) : _mm512_setzero_si512();
    _mm512_storeu_si512(panel[0] + at, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_storeu_si512(panel[1] + at, _mm512_permutex2var_epi16(even, high, odd));
  }
}
#endif

INLINE bool is_whole(const Block& block) {
  return block.first[1] == block.first[0] + W && block.count[0] >= W && block.count[1] >= W;
}

template <class Kind>
void pack_panel(const Matrix& matrix, int64_t first, int count, int64_t begin, int64_t end, uint32_t* panel) {
  if (count <= 0) {
    memset(panel, 0, size_t(steps_of(end - begin, Kind::pack)) * W * 4);
  } else if (matrix.in_stride == element_size(matrix.format)) {
    Readers<Kind>::choose(matrix, [&](auto weights) { pack_outputs<Kind>(weights, first, count, begin, end, panel); });
  } else {
    auto pack = [&](auto format) {
      typedef decltype(format) Format;
      const char* data = matrix.data + first * element_size(matrix.format);
      auto row_of = [&](int64_t k) {
        return reinterpret_cast<const typename Format::Element*>(data + k * matrix.in_stride);
      };
      pack_inputs<Kind, Format>(row_of, count, begin, end, panel, W);
    };
    if constexpr (Kind::pack == 2) {
      pack(BF16());
    } else {
      matrix.format == MOESAIC_F32 ? pack(F32()) : matrix.format == MOESAIC_BF16 ? pack(BF16()) : pack(F16());
    }
  }
}

// Memory to be fetched while a tile is computed: a little at every step, or the same place again where there is none.
struct Fetch {
  const char* from;
  int64_t stride;  // bytes a step
};

// `lane(m, s)` is the 32-bit lane of row m at step s.
template <class Kind, int M, class Lane>
INLINE void tile(const Lane& lane, int64_t steps, const uint32_t (*panel)[STEPS * W], float* sums, bool first,
                 Fetch fetch) {
  F total[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    total[m][0] = first ? F{} : read<F>(sums + m * 2 * W);
    total[m][1] = first ? F{} : read<F>(sums + m * 2 * W + W);
  }
  for (int64_t s = 0; s < steps; ++s) {
    const U low = read<U>(panel[0] + s * W), high = read<U>(panel[1] + s * W);
    __builtin_prefetch(fetch.from, 0, 2);
    fetch.from += fetch.stride;
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
INLINE void tile_rows(int count, const Lanes& lanes, int64_t steps, const uint32_t (*panel)[STEPS * W], float* sums,
                      bool first, Fetch fetch) {
  if (count == M) {
    lanes.template with<Kind, M>(steps, panel, sums, first, fetch);
  } else if constexpr (M > 1) {
    tile_rows<Kind, Lanes, M - 1>(count, lanes, steps, panel, sums, first, fetch);
  }
}

// Lanes of rows that are given by pointers.
struct RowLanes {
  const char* const* rows;
  int64_t offset;  // bytes
  template <class Kind, int M>
  INLINE_MEMBER void with(int64_t steps, const uint32_t (*panel)[STEPS * W], float* sums, bool first,
                          Fetch fetch) const {
    const char* at[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) at[m] = rows[m] + offset;
    tile<Kind, M>([&](int m, int64_t s) { return read<uint32_t>(at[m] + s * 4); }, steps, panel, sums, first, fetch);
  }
};

// Lanes of rows that lie side by side, one step after the other.
struct PackedLanes {
  const uint32_t* lanes;
  int64_t stride;
  template <class Kind, int M>
  INLINE_MEMBER void with(int64_t steps, const uint32_t (*panel)[STEPS * W], float* sums, bool first,
                          Fetch fetch) const {
    const uint32_t* from = lanes;
    const int64_t step = stride;
    tile<Kind, M>([&](int m, int64_t s) { return from[s * step + m]; }, steps, panel, sums, first, fetch);
  }
};

// The sums of up to BLOCK_ROWS rows: `pack(begin, steps)` fills the panel, `lanes_of(row, step)` are where rows begin,
// and `fetch_of(tile, tiles)` is what to fetch meanwhile.
template <class Kind, class Pack, class LanesOf, class FetchOf>
INLINE void panel_block(Workspace& workspace, int num_rows, int64_t steps, const Pack& pack, const LanesOf& lanes_of,
                        const FetchOf& fetch_of) {
  const int row_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t parts = (steps + STEPS - 1) / STEPS;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t s = part * STEPS, count = steps - s < STEPS ? steps - s : STEPS;
    pack(s, count);
    for (int t = 0; t < row_tiles; ++t) {  // of even heights: a low one would wait for its few sums
      const int r = num_rows * t / row_tiles, end = num_rows * (t + 1) / row_tiles;
      tile_rows<Kind>(end - r, lanes_of(r, s), count, workspace.panel, workspace.sums + r * 2 * W, s == 0,
                      fetch_of(part * row_tiles + t, parts * row_tiles));
    }
  }
  if (!steps) memset(workspace.sums, 0, size_t(num_rows) * 2 * W * 4);
}

// The stored weights of a block, where they are consecutive: what a thread will need next.
struct Ahead {
  const char* from[2];
  int64_t bytes;  // of each
};

INLINE Ahead ahead_of(const Matrix& matrix, const Block& block) {
  if (matrix.in_stride != element_size(matrix.format)) return {};
  return {{matrix.data + block.first[0] * matrix.out_stride, matrix.data + block.first[1] * matrix.out_stride},
          W * matrix.out_stride};
}

template <class Kind>
__attribute__((noinline)) void panel_rows(const Matrix& matrix, const Block& block,
                                          const typename Kind::Element* const* rows, int num_rows, int64_t inputs,
                                          Workspace& workspace, const Ahead& ahead) {
  const int64_t steps = steps_of(inputs, Kind::pack), bytes = 2 * ahead.bytes;
  const char* const* lanes = reinterpret_cast<const char* const*>(rows);
  panel_block<Kind>(
      workspace, num_rows, steps,
      [&](int64_t step, int64_t count) {
        const int64_t begin = step * Kind::pack,
                      end = begin + count * Kind::pack < inputs ? begin + count * Kind::pack : inputs;
#if defined(__AVX512BF16__)
        if constexpr (Kind::pack == 2) {
          if (matrix.format == MOESAIC_BF16 && matrix.in_stride != 2 && is_whole(block)) {
            const char* data = matrix.data + block.first[0] * 2;
            return pack_pairs([&](int64_t k) { return data + k * matrix.in_stride; }, begin, end, workspace.panel);
          }
        }
#endif
        for (int v = 0; v < 2; ++v)
          pack_panel<Kind>(matrix, block.first[v], block.count[v], begin, end, workspace.panel[v]);
      },
      [&](int row, int64_t step) { return RowLanes{lanes + row, step * 4}; },
      [&](int64_t tile, int64_t tiles) -> Fetch {
        if (!bytes) return {reinterpret_cast<const char*>(workspace.sums), 0};
        const int64_t begin = bytes * tile / tiles;
        return {begin < ahead.bytes ? ahead.from[0] + begin : ahead.from[1] + begin - ahead.bytes,
                bytes / (tiles * (steps < STEPS ? steps : STEPS)) + 1};
      });
}

// The sum over `num_rows` rows of the outer products of their W-wide pieces, given as packed lanes, with a block of
// the rows of `right`.
template <class Kind>
__attribute__((noinline)) void panel_lanes(const uint32_t* lanes, int64_t stride, int height,
                                           const typename Kind::Element* const* right, const Block& block,
                                           int64_t num_rows, Workspace& workspace) {
  panel_block<Kind>(
      workspace, height, steps_of(num_rows, Kind::pack),
      [&](int64_t step, int64_t count) {
        const int64_t begin = step * Kind::pack,
                      end = begin + count * Kind::pack < num_rows ? begin + count * Kind::pack : num_rows;
#if defined(__AVX512BF16__)
        if constexpr (Kind::pack == 2) {
          if (is_whole(block))
            return pack_pairs([&](int64_t k) { return right[k] + block.first[0]; }, begin, end, workspace.panel);
        }
#endif
        for (int v = 0; v < 2; ++v)
          pack_inputs<Kind, typename Kind::Format>(
              [&](int64_t k) { return right[k] + (block.count[v] > 0 ? block.first[v] : 0); }, block.count[v], begin,
              end, workspace.panel[v], W);
      },
      [&](int row, int64_t step) { return PackedLanes{lanes + step * stride + row, stride}; },
      [&](int64_t, int64_t) -> Fetch { return {reinterpret_cast<const char*>(workspace.sums), 0}; });
}

}  // namespace moesaic::MOESAIC_VARIANT
