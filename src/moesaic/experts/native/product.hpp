// Rows of features times one expert's matrix, for a block of its outputs: what every pass of the layer is made of.
#pragma once
#include "dot_int4.hpp"
#include "panel.hpp"

namespace moesaic::MOESAIC_VARIANT {

INLINE void scale_sums(const Matrix& matrix, const Block& block, int num_rows, float* sums) {
  for (int v = 0; v < 2; ++v) {
    const F scale = load_up_to(F32(), matrix.scale + block.first[v], block.count[v]);
    for (int r = 0; r < num_rows; ++r) {
      float* at = sums + r * 2 * W + v * W;
      store(F32(), at, read<F>(at) * scale);
    }
  }
}

// rows[r] · matrix for the outputs of `block`; calls done(begin, count, sums) for every part of the rows, and fetches
// `ahead` meanwhile. With `row_invariant` every row is added up in the same order, however many there are.
template <class Kind, class Done>
void product(const Matrix& matrix, const Block& block, const typename Kind::Element* const* rows, int64_t num_rows,
             int64_t inputs, bool row_invariant, Workspace& workspace, const Ahead& ahead, const Done& done) {
  const bool by_panel = (num_rows >= PANEL_FROM && !row_invariant) || matrix.in_stride != element_size(matrix.format);
  for (int64_t begin = 0; begin < num_rows; begin += BLOCK_ROWS) {
    const int count = num_rows - begin < BLOCK_ROWS ? int(num_rows - begin) : BLOCK_ROWS;
    if (by_panel) {
      panel_rows<Kind>(matrix, block, rows + begin, count, inputs, workspace, begin ? Ahead{} : ahead);
    } else {
      Readers<Kind>::choose(
          matrix, [&](auto weights) {
            dot_block<Kind>(weights, block, rows + begin, count, inputs, row_invariant, workspace);
          });
    }
    if (matrix.scale) scale_sums(matrix, block, count, workspace.sums);
    done(begin, count, workspace.sums);
  }
}

}  // namespace moesaic::MOESAIC_VARIANT
