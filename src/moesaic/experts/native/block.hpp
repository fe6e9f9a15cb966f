// A block of one expert's outputs, and what a thread needs to compute it.
#pragma once
#include "matrix.hpp"

namespace moesaic::MOESAIC_VARIANT {

constexpr int BLOCK_ROWS = 192;  // rows whose sums are kept at once
constexpr int STEPS = 256;       // of inputs that are packed at once, for the first cache
constexpr int PANEL_FROM = 12;   // rows from which repacking weights pays

// Two vectors of neighbouring outputs: for a gated up projection the gate's and the up's, else one after the other.
struct Block {
  int64_t first[2];
  int count[2];  // at most W; 0 or less where there are none
};

struct Workspace {
  uint32_t panel[2][STEPS * W];
  float sums[BLOCK_ROWS * 2 * W];
};

}  // namespace moesaic::MOESAIC_VARIANT
