// The routed rows of a call: which token, which weight, which memory; and the experts in groups of bounded scratch.
#pragma once
#include "product.hpp"
#include "team.hpp"

namespace moesaic::MOESAIC_VARIANT {

// Padding rows are left out. Arrays are [N] unless said otherwise.
struct Rows {
  int32_t* token;
  int32_t* number;  // of the row in the caller's order
  float* weight;
  int32_t* slot;
  int32_t* begin;    // [E + 1]
  int32_t* experts;  // [E] those that have rows, in order
  int32_t active;

  void plan(Arena& arena, const MoesaicLayer& layer) {
    token = arena.take<int32_t>(layer.rows);
    number = arena.take<int32_t>(layer.rows);
    weight = arena.take<float>(layer.rows);
    slot = arena.take<int32_t>(layer.rows);
    begin = arena.take<int32_t>(layer.num_experts + 1);
    experts = arena.take<int32_t>(layer.num_experts);
  }

  int64_t count(int64_t expert) const { return begin[expert + 1] - begin[expert]; }

  void fill(const MoesaicLayer& layer) {
    int32_t kept = 0;
    int64_t n = 0;
    active = 0;
    for (int64_t e = 0; e < layer.num_experts; ++e) {
      begin[e] = kept;
      for (; n < layer.offsets[e]; ++n) {
        const int64_t of = layer.permutation[n];
        if (of >= layer.tokens * layer.top_k) continue;
        token[kept] = int32_t(of / layer.top_k);
        number[kept] = int32_t(n);
        slot[kept] = int32_t(of);
        weight[kept++] = routing_weight(layer, of);
      }
      if (kept > begin[e]) experts[active++] = int32_t(e);
    }
    begin[layer.num_experts] = kept;
  }

  static float routing_weight(const MoesaicLayer& layer, int64_t slot) {
    if (layer.weights_dtype == MOESAIC_F32) return static_cast<const float*>(layer.weights)[slot];
    const uint16_t bits = static_cast<const uint16_t*>(layer.weights)[slot];
    if (layer.weights_dtype == MOESAIC_F16) return half_to_float(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float weight;
    memcpy(&weight, &wide, 4);
    return weight;
  }
};

// A run of active experts [first, last) whose rows are [begin, end).
struct Group {
  int32_t first, last;
  int32_t begin, end;
};

// As many experts from `first` on as have together at most `most` rows, and at least one.
inline Group group_from(const Rows& rows, int32_t first, int64_t most) {
  Group group = {first, first, rows.begin[rows.experts[first]], 0};
  do {
    group.end = rows.begin[rows.experts[group.last++] + 1];
  } while (group.last < rows.active && rows.begin[rows.experts[group.last] + 1] - group.begin <= most);
  return group;
}

inline int64_t largest_group(const Rows& rows, int64_t most) {
  int64_t largest = 0;
  for (int32_t first = 0; first < rows.active;) {
    const Group group = group_from(rows, first, most);
    if (group.end - group.begin > largest) largest = group.end - group.begin;
    first = group.last;
  }
  return largest;
}

// Scratch rows of a group stay within the outer caches.
constexpr int64_t GROUP_BYTES = int64_t(8) << 20;

// [T, width] features as rows of the kind's elements, padded with zeros to whole lanes; the tensor itself where it is
// so already.
template <class Kind, class Format>
struct Features {
  typedef typename Kind::Element Element;
  const char* source;
  int64_t source_stride;  // bytes
  Element* copy;
  int64_t width, stride, tokens;
  bool direct;

  void plan(Arena& arena, const void* from, int64_t from_stride, int64_t num_tokens, int64_t features) {
    source = static_cast<const char*>(from);
    source_stride = from_stride * int64_t(sizeof(typename Format::Element));
    tokens = num_tokens, width = features;
    direct = sizeof(Element) == sizeof(typename Format::Element) && width % Kind::pack == 0;
    stride = (width + 31) / 32 * 32;
    copy = arena.take<Element>(direct ? 0 : tokens * stride);
  }

  const Element* row(int64_t token) const {
    return direct ? reinterpret_cast<const Element*>(source + token * source_stride) : copy + token * stride;
  }

  void convert(int64_t token) const {
    if (direct) return;
    const auto* from = reinterpret_cast<const typename Format::Element*>(source + token * source_stride);
    Element* to = copy + token * stride;
    for (int64_t i = 0; i < stride; i += W)
      store(typename Kind::Format(), to + i, load_up_to(Format(), from + i, width - i));
  }
};

// The kind's rows of scratch, `width` rounded up to whole lanes.
template <class Kind>
struct Scratch {
  typename Kind::Element* data;
  int64_t stride;

  void plan(Arena& arena, int64_t rows, int64_t width) {
    stride = (width + 31) / 32 * 32;
    data = arena.take<typename Kind::Element>(rows * stride);
  }
  typename Kind::Element* row(int64_t index) const { return data + index * stride; }
};

}  // namespace moesaic::MOESAIC_VARIANT
