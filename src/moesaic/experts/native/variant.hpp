// The table of one variant's functions; each variant's translation unit fills one in.
#pragma once
#include "moesaic.h"

namespace moesaic {

struct Variant {
  int (*forward)(const MoesaicLayer&);
  int (*route_and_forward)(const MoesaicGate&, const MoesaicLayer&);
  int (*backward)(const MoesaicLayer&, const MoesaicGradients&);
  int (*linear)(const MoesaicLinear&);
  int (*attend)(const MoesaicAttention&);
  uint64_t (*read)(const void* data, int64_t bytes, int32_t threads);
  double (*multiply_adds)(int32_t dtype, int64_t steps, int32_t threads);
};

}  // namespace moesaic
