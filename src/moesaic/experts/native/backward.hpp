#pragma once
#include "forward.hpp"
namespace moesaic::MOESAIC_VARIANT {
template <class Kind, class Format>
struct Backward {
  const MoesaicLayer& layer; Rows rows;
  Backward(const MoesaicLayer& of, const MoesaicGradients&) : layer(of) {}
  int run() { return 1; }
};
}
