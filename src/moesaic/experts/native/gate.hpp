// The routes of a few tokens, on one thread: logits, scores, the best K experts, their weights, and the rows by expert.
#pragma once
#include "rows.hpp"

namespace moesaic::MOESAIC_VARIANT {

// Scores of one token's logits, `count` of them.
INLINE void sigmoids(const float* logits, float* scores, int64_t count) {
  for (int64_t e = 0; e < count; e += W) {
    const F one = splat(1.0f), x = load_up_to(F32(), logits + e, count - e);
    store_up_to(F32(), scores + e, one / (one + exponential(-x)), count - e);
  }
}

INLINE void softmax(const float* logits, float* scores, int64_t count) {
  float largest = logits[0];
  for (int64_t e = 1; e < count; ++e) largest = logits[e] > largest ? logits[e] : largest;
  F total = {};
  for (int64_t e = 0; e < count; e += W) {
    const F powers = exponential(load_up_to(F32(), logits + e, count - e) - splat(largest));
    store_up_to(F32(), scores + e, powers, count - e);
    total = total + first_lanes(powers, count - e);
  }
  const F share = splat(1.0f / sum(total));
  for (int64_t e = 0; e < count; e += W)
    store_up_to(F32(), scores + e, load_up_to(F32(), scores + e, count - e) * share, count - e);
}

template <class Format>
struct Gate {
  typedef typename Format::Element Element;
  const MoesaicGate& gate;
  const MoesaicLayer& layer;
  float* x;       // [D] of one token
  float* choice;  // [E] what its experts are chosen by
  int64_t* permutation;
  int32_t* offsets;

  Gate(const MoesaicGate& of, const MoesaicLayer& its) : gate(of), layer(its) {}

  void plan(Arena& arena) {
    x = arena.take<float>(layer.d_model);
    choice = arena.take<float>(layer.num_experts);
    permutation = arena.take<int64_t>(layer.tokens * layer.top_k);
    offsets = arena.take<int32_t>(layer.num_experts);
  }

  static float value(const void* from, int64_t index) {
    float lanes[W];
    store(F32(), lanes, load_some(Format(), static_cast<const Element*>(from) + index, 1));
    return lanes[0];
  }

  float logit(int64_t expert) const {
    const Element* weight = static_cast<const Element*>(gate.weight) + expert * layer.d_model;
    F sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * W <= layer.d_model; i += 2 * W)
      for (int v = 0; v < 2; ++v)
        sums[v] = multiply_add(load(Format(), weight + i + v * W), load(F32(), x + i + v * W), sums[v]);
    for (; i < layer.d_model; i += W) {
      const int64_t left = layer.d_model - i;
      sums[0] = multiply_add(load_up_to(Format(), weight + i, left), load_up_to(F32(), x + i, left), sums[0]);
    }
    return sum(sums[0] + sums[1]) + (gate.bias ? value(gate.bias, expert) : 0.0f);
  }

  void route(int64_t token) const {
    const Element* from = static_cast<const Element*>(layer.x) + token * layer.x_stride;
    for (int64_t i = 0; i < layer.d_model; i += W)
      store_up_to(F32(), x + i, load_up_to(Format(), from + i, layer.d_model - i), layer.d_model - i);
    float* logits = gate.logits + token * layer.num_experts;
    float* scores = gate.scores + token * layer.num_experts;
    for (int64_t e = 0; e < layer.num_experts; ++e) logits[e] = logit(e);
    if (gate.kind == MOESAIC_SOFTMAX) {
      softmax(logits, scores, layer.num_experts);
    } else {
      sigmoids(logits, scores, layer.num_experts);
    }
    for (int64_t e = 0; e < layer.num_experts; ++e)
      choice[e] = gate.selection ? scores[e] + gate.selection[e] : logits[e];
    int64_t* ids = gate.expert_ids + token * layer.top_k;
    float* weights = gate.weights + token * layer.top_k;
    if (gate.mask && !gate.mask[token]) {
      for (int64_t k = 0; k < layer.top_k; ++k) ids[k] = layer.num_experts, weights[k] = 0;
    } else {
      choose(ids);
      weigh(scores, ids, weights);
    }
  }

  // The best first, of equals the one with the lower number; whatever the values, K different experts. A NaN goes
  // before all numbers, as in PyTorch.
  void choose(int64_t* ids) const {
    for (int64_t k = 0; k < layer.top_k; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < layer.num_experts; ++e) {
        if (taken(ids, k, e)) continue;
        if (best < 0 || choice[e] > choice[best] || (choice[e] != choice[e] && choice[best] == choice[best])) best = e;
      }
      ids[k] = best;
    }
  }
  static bool taken(const int64_t* ids, int64_t count, int64_t expert) {
    for (int64_t k = 0; k < count; ++k)
      if (ids[k] == expert) return true;
    return false;
  }

  void weigh(const float* scores, const int64_t* ids, float* weights) const {
    float total = gate.epsilon;
    for (int64_t k = 0; k < layer.top_k; ++k) {
      const float score = scores[ids[k]];
      weights[k] = gate.unit_scale ? 1 + value(gate.unit_scale, ids[k]) * (2 * score - 1) : score;
      total += weights[k];
    }
    for (int64_t k = 0; k < layer.top_k; ++k)
      weights[k] = (gate.normalize ? weights[k] / total : weights[k]) * gate.scale;
  }

  // Rows in the order of the slots within an expert; how many there are.
  int64_t order() const {
    const int64_t slots = layer.tokens * layer.top_k;
    memset(gate.counts, 0, sizeof(int64_t) * size_t(layer.num_experts));
    for (int64_t n = 0; n < slots; ++n)
      if (gate.expert_ids[n] < layer.num_experts) ++gate.counts[gate.expert_ids[n]];
    int32_t rows = 0;
    for (int64_t e = 0; e < layer.num_experts; ++e) offsets[e] = rows, rows += int32_t(gate.counts[e]);
    // An expert's offset moves from its first row to its end while its rows are given out.
    for (int64_t n = 0; n < slots; ++n)
      if (gate.expert_ids[n] < layer.num_experts) permutation[offsets[gate.expert_ids[n]]++] = n;
    return rows;
  }
};

// Decides the routes and lets `forward` compute the layer; 0, or 1 where memory ran out.
template <class Gate>
int routed(Gate&& gate, int (*forward)(const MoesaicLayer&)) {
  Arena arena = {nullptr, 0};
  gate.plan(arena);
  void* const scratch = borrow_scratch(arena.used);
  if (!scratch) return 1;
  arena = {static_cast<char*>(scratch), 0};
  gate.plan(arena);
  for (int64_t token = 0; token < gate.layer.tokens; ++token) gate.route(token);
  MoesaicLayer layer = gate.layer;
  layer.rows = gate.order();
  layer.permutation = gate.permutation;
  layer.offsets = gate.offsets;
  layer.weights = gate.gate.weights;
  layer.weights_dtype = MOESAIC_F32;
  const int failed = forward(layer);
  return_scratch(scratch);
  return failed;
}

}  // namespace moesaic::MOESAIC_VARIANT
