// What stands between the up and the down projection, and its derivative.
#pragma once
#include "vector.hpp"

namespace moesaic::MOESAIC_VARIANT {

struct Slope {
  F value, derivative;
};

INLINE F sigmoid(F x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

struct Silu {
  static constexpr bool gated = true;
  // Not x times sigmoid: minus infinity then gives NaN, as in PyTorch.
  INLINE F value(F x) { return x / (splat(1.0f) + exponential(-x)); }
  INLINE Slope slope(F x) {
    const F s = sigmoid(x);
    return {value(x), s * (splat(1.0f) + x * (splat(1.0f) - s))};
  }
};

struct Relu {
  static constexpr bool gated = false;
  INLINE F value(F x) { return select(x <= F{}, F{}, x); }  // a NaN stays
  INLINE Slope slope(F x) { return {value(x), select(x <= F{}, F{}, splat(1.0f))}; }
};

// The normal distribution's cumulative function and density; error function by Abramowitz and Stegun, Handbook of
// Mathematical Functions, 7.1.26 (absolute error below 1.5e-7).
struct Normal {
  F cumulative, density;
};

INLINE Normal normal(F x) {
  const F z = absolute(x) * splat(0.70710678f);
  const F bell = exponential(-z * z);
  const F t = splat(1.0f) / multiply_add(z, splat(0.3275911f), splat(1.0f));
  F series = splat(1.061405429f);
  series = multiply_add(series, t, splat(-1.453152027f));
  series = multiply_add(series, t, splat(1.421413741f));
  series = multiply_add(series, t, splat(-0.284496736f));
  series = multiply_add(series, t, splat(0.254829592f));
  const F tail = splat(0.5f) * series * t * bell;
  return {select(x < F{}, tail, splat(1.0f) - tail), bell * splat(0.39894228f)};
}

template <bool is_gated>
struct Gelu {
  static constexpr bool gated = is_gated;
  INLINE F value(F x) { return x * normal(x).cumulative; }
  INLINE Slope slope(F x) {
    const Normal n = normal(x);
    return {x * n.cumulative, multiply_add(x, n.density, n.cumulative)};
  }
};

// 0.5 * (1 + tanh(u)) is the sigmoid of 2u.
template <bool is_gated>
struct GeluTanh {
  static constexpr bool gated = is_gated;
  INLINE F twice_u(F x) { return splat(1.59576912f) * multiply_add(splat(0.044715f) * x, x * x, x); }
  INLINE F value(F x) { return x * sigmoid(twice_u(x)); }
  INLINE Slope slope(F x) {
    const F s = sigmoid(twice_u(x));
    const F du = splat(1.59576912f) * multiply_add(splat(3 * 0.044715f) * x, x, splat(1.0f));
    return {x * s, multiply_add(x * du, s * (splat(1.0f) - s), s)};
  }
};

}  // namespace moesaic::MOESAIC_VARIANT
