// Everything that a variant offers, for its one translation unit.
#pragma once
#include "attention.hpp"
#include "backward.hpp"
#include "forward.hpp"
#include "gate.hpp"
#include "limits.hpp"
#include "linear.hpp"
#include "variant.hpp"

namespace moesaic::MOESAIC_VARIANT {

// Calls `work` with the kind of arithmetic and the format that fit a dtype.
template <class Work>
int with_kind(int32_t dtype, const Work& work) {
  switch (dtype) {
    case MOESAIC_F32:
      return work(FloatKind(), F32());
    case MOESAIC_F16:
      return work(FloatKind(), F16());
#if defined(__AVX512BF16__)
    default:
      return work(Bf16Kind(), BF16());
#else
    default:
      return work(FloatKind(), BF16());
#endif
  }
}

static int forward(const MoesaicLayer& layer) {
  return with_kind(layer.dtype,
                   [&](auto kind, auto format) { return over_rows(Forward<decltype(kind), decltype(format)>(layer)); });
}

static int route_and_forward(const MoesaicGate& gate, const MoesaicLayer& layer) {
  return with_kind(layer.dtype, [&](auto, auto format) {
    return routed(Gate<decltype(format)>(gate, layer), forward);
  });
}

static int backward(const MoesaicLayer& layer, const MoesaicGradients& gradients) {
  return with_kind(layer.dtype, [&](auto kind, auto format) {
    return over_rows(Backward<decltype(kind), decltype(format)>(layer, gradients));
  });
}

static int linear(const MoesaicLinear& layer) {
  return with_kind(layer.dtype,
                   [&](auto kind, auto format) { return Linear<decltype(kind), decltype(format)>(layer).run(); });
}

static int attend(const MoesaicAttention& attention) {
  return with_kind(attention.dtype,
                   [&](auto, auto format) { return Attention<decltype(format)>(attention).run(); });
}

extern const Variant functions;
const Variant functions = {forward, route_and_forward, backward, linear, attend, read_all, multiply_adds};

}  // namespace moesaic::MOESAIC_VARIANT
